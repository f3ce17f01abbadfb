"""Pure: which peers failed, and when they are asked again.

    well ── failed ──▶ avoided ── proven alive ──▶ on probation ── worked ──▶ well
                          ▲                              │
                          └────────── failed ────────────┘   the pause doubles

A peer proves alive by a restart, which its record shows by a higher incarnation, or by both a record that it published
and a ping that it answered after the failure, once a pause is over. A peer that only refused (it is full, or leaves) is
avoided until its next record, which says whether it has room.

Shared by all sessions of a client, so that a failure is met once.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from swarm_protocol.ids import PeerId
from swarm_protocol.records import NodeRecord

LONGEST_PAUSE_S = 600.0
"""A node that fails again and again is tried six times an hour."""

FORGET_S = 3600.0
"""After which a failure counts no more, whatever came of the peer."""


@dataclass(slots=True)
class _Failure:
    at_s: float
    incarnation: int
    pause_s: float
    published_s: float = float("-inf")
    answered_s: float = float("-inf")
    has_restarted: bool = False

    def is_proven(self, now_s: float) -> bool:
        is_alive = self.published_s > self.at_s and self.answered_s > self.at_s
        return self.has_restarted or (is_alive and now_s >= self.at_s + self.pause_s)


class PeerHealth:
    """Book-keeping of failures. All times are of one clock, the swarm's, since records carry it."""

    def __init__(self, first_pause_s: float) -> None:
        """`first_pause_s` is how long a peer is left alone after its first failure, however alive it looks."""
        self._first_pause_s = first_pause_s
        self._failures: dict[PeerId, _Failure] = {}
        self._refused_at_s: dict[PeerId, float] = {}

    def failed(self, peer_id: PeerId, incarnation: int, now_s: float) -> None:
        """A peer, whose record had `incarnation`, broke off, did not answer, or broke the protocol."""
        before = self._failures.get(peer_id)
        pause_s = self._first_pause_s
        if before is not None:
            # Sessions that fail together are one failure: only what comes after a proof makes the pause longer.
            pause_s = before.pause_s if not before.is_proven(now_s) else min(LONGEST_PAUSE_S, 2 * before.pause_s)
        self._failures[peer_id] = _Failure(now_s, incarnation, pause_s)

    def refused(self, peer_id: PeerId, now_s: float) -> None:
        """A peer answered that it takes nothing more now."""
        self._refused_at_s[peer_id] = now_s

    def worked(self, peer_id: PeerId) -> None:
        """A step went through a peer."""
        if peer_id in self._failures:
            del self._failures[peer_id]

    def answered(self, peer_id: PeerId, now_s: float) -> None:
        """A peer answered a ping that was sent at `now_s` or later."""
        failure = self._failures.get(peer_id)
        if failure is not None:
            failure.answered_s = now_s

    def read(self, records: Iterable[NodeRecord], now_s: float) -> None:
        """Take the newest records of nodes as what they prove."""
        for record in records:
            peer_id = PeerId(record.peer_id)
            failure = self._failures.get(peer_id)
            if failure is not None:
                failure.published_s = max(failure.published_s, record.published_s)
                failure.has_restarted |= record.incarnation > failure.incarnation
            if record.published_s > self._refused_at_s.get(peer_id, float("inf")):
                del self._refused_at_s[peer_id]
        self._failures = {p: f for p, f in self._failures.items() if now_s - f.at_s <= FORGET_S}
        self._refused_at_s = {p: at_s for p, at_s in self._refused_at_s.items() if now_s - at_s <= FORGET_S}

    def failing(self, now_s: float) -> frozenset[PeerId]:
        """Return the peers that failed and have not proven alive since."""
        return frozenset(peer_id for peer_id, failure in self._failures.items() if not failure.is_proven(now_s))

    def avoided(self, now_s: float) -> frozenset[PeerId]:
        """Return the peers that are not to be asked now: the failing ones, and those that refused."""
        return self.failing(now_s) | self._refused_at_s.keys()

    def due_pings(self, now_s: float) -> list[PeerId]:
        """Return the peers that only lack a ping to prove alive."""
        return sorted(
            peer_id
            for peer_id, failure in self._failures.items()
            if failure.published_s > failure.at_s
            and not failure.answered_s > failure.at_s
            and now_s >= failure.at_s + failure.pause_s
        )
