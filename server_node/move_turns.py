"""Pure: when a node may move to other blocks, and which of several nodes that want to may do so now.

A node stays for ten minutes where it is before it looks for a better place, and some more that its peer id tells, so
that nodes that joined together do not look together. Then it claims the next move: all claims of one model are read
after a wait, and the one with the lowest hash moves. A directory has no compare-and-swap; that all see the same claims
after the wait is enough, and where two do not, two nodes move at once, which only costs a move.
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass

DWELL_S = 600.0
"""For which a node stays where it is: a move costs its sessions a hand-over and the node a load."""

JITTER_S = 120.0
"""At most so much longer."""

CLAIM_WAIT_S = 15.0
"""After which all have seen a claim: more than the period in which records are refreshed."""

CLAIM_LIFETIME_S = 120.0
"""For which a claim that has won holds: within it the node drains, or has given up."""


@dataclass(frozen=True, slots=True)
class Claim:
    """That node `peer_id` wants to move to `blocks`, written as a span, in round `round_number` of claims."""

    peer_id: str
    blocks: str
    round_number: int

    @property
    def rank(self) -> bytes:
        """What claims are ordered by. With the round in it, it is not always the same peer's turn."""
        return _hash(f"{self.round_number}/{self.peer_id}/{self.blocks}")


def round_of(now_s: float) -> int:
    """Return the round of claims that runs at `now_s`, seconds since the epoch."""
    return int(now_s // CLAIM_LIFETIME_S)


def may_look_at_s(arrived_s: float, peer_id: str) -> float:
    """Return when a node that took its blocks at `arrived_s` may look for better ones."""
    share = int.from_bytes(_hash(peer_id)[:8]) / 2**64
    return arrived_s + DWELL_S + share * JITTER_S


def may_look(arrived_s: float, peer_id: str, now_s: float, *, is_a_block_missing: bool) -> bool:
    """Whether a node may look for better blocks now; a block that nobody holds does not wait."""
    return is_a_block_missing or now_s >= may_look_at_s(arrived_s, peer_id)


def winner(claims: Collection[Claim], now_s: float) -> Claim | None:
    """Return the claim of the present round that may move; None if there is none. Older claims count for nothing."""
    present = [claim for claim in claims if claim.round_number == round_of(now_s)]
    return min(present, key=lambda claim: (claim.rank, claim.peer_id), default=None)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
