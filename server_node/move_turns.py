"""Pure: when a node may move to other blocks, and which of several nodes that want to may do so now.

A node stays for ten minutes where it is before it looks for a better place, and some more that its peer id tells, so
that nodes that joined together do not look together. Then it claims the next move: time is cut into rounds, claims are
made early in a round and read later in it, and the one with the lowest hash moves. A directory has no compare-and-swap;
that all see the same claims after the wait is enough, and where two do not, two nodes move at once, which only costs a
move.
"""

import hashlib
from collections.abc import Collection

from swarm_protocol.move_claims import MoveClaim

DWELL_S = 600.0
"""For which a node stays where it is: a move costs its sessions a hand-over and the node a load."""

JITTER_S = 120.0
"""At most so much longer."""

ROUND_S = 30.0
"""Of claims: within it the node that may move has begun to drain, and says so in its record."""

ROUNDS_FOR_SPEED = 4
"""Nodes move to make blocks faster in one round of so many; to blocks that nobody holds, in every one."""

LOOK_SPREAD_S = 8.0
"""From the start of a round: in it nodes look, each at its own time, so that not all ask the directory at once."""

CLAIM_BY_S = 12.0
"""From the start of a round: who has not claimed by then, waits for the next one."""

READ_AT_S = 20.0
"""From the start of a round: all have seen all claims then, since a store takes less than what is between."""


def round_of(now_s: float) -> int:
    """Return the round of claims that runs at `now_s`, seconds since the epoch."""
    return int(now_s // ROUND_S)


def next_look_s(peer_id: str, now_s: float) -> float:
    """Return when a node looks for better blocks: in this round if its time is still to come, else in the next."""
    look_s = round_of(now_s) * ROUND_S + _share(peer_id) * LOOK_SPREAD_S
    return look_s if look_s >= now_s else look_s + ROUND_S


def may_claim(round_number: int, now_s: float) -> bool:
    """Whether a claim of this round is still in time."""
    return now_s < round_number * ROUND_S + CLAIM_BY_S


def may_look_at_s(arrived_s: float, peer_id: str) -> float:
    """Return when a node that took its blocks at `arrived_s` may look for better ones."""
    return arrived_s + DWELL_S + _share(peer_id) * JITTER_S


def may_look(arrived_s: float, peer_id: str, now_s: float, *, is_a_block_missing: bool) -> bool:
    """Whether a node may look for better blocks now; a block that nobody holds does not wait."""
    is_for_speed = round_of(now_s) % ROUNDS_FOR_SPEED == 0
    return is_a_block_missing or (is_for_speed and now_s >= may_look_at_s(arrived_s, peer_id))


def winner(claims: Collection[MoveClaim], round_number: int) -> MoveClaim | None:
    """Return the claim of this round that may move; None if there is none. Older claims count for nothing."""
    present = [claim for claim in claims if claim.round_number == round_number]
    return min(present, key=lambda claim: (_rank(claim), claim.peer_id), default=None)


def _rank(claim: MoveClaim) -> bytes:
    # With the round in it, it is not always the same peer's turn.
    return _hash(f"{claim.round_number}/{claim.peer_id}/{claim.start_block}:{claim.end_block}")


def _share(peer_id: str) -> float:
    return int.from_bytes(_hash(peer_id)[:8]) / 2**64


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
