"""Pure: what a client knows of the nodes of one model: their records, and what it measured itself."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from swarm_protocol.ids import PeerId
from swarm_protocol.records import RECORD_LIFETIME_S, NodeRecord

PING_AGE_S = 30.0
"""How long a measured ping is good for; ways through the net change within minutes."""

SPEED_AGE_S = 300.0
"""How long what this client measured of a node counts instead of what the node says of itself."""

START_AGE_S = 2 * RECORD_LIFETIME_S
"""How long an older start of a node is told from its present one: for longer no record lives."""

FORGET_S = 3600.0
"""After which a speed that was measured is not held against a node any more."""

HOP_S = 0.002
"""Software of one hop, both ends and their daemons: 1.2 to 2.3 ms at hidden 4096, see docs/performance.md."""

_WEIGHT = 0.3
"""Of a new measurement against those before: half of what is known is from the last two, one outlier moves a third."""


@dataclass(frozen=True, slots=True)
class OwnSpeed:
    """Seconds per block that steps of this client took at a node, its queue included; whether that is recent."""

    block_s: float
    is_recent: bool


@dataclass(frozen=True, slots=True)
class SaidPings:
    """What nodes say of round trips to each other: for each, who says it and of whom, by number, and the seconds."""

    near: npt.NDArray[np.intp]
    far: npt.NDArray[np.intp]
    pings_s: npt.NDArray[np.float64]

    @classmethod
    def of(cls, records: Sequence[NodeRecord]) -> "SaidPings":
        """Return those between the nodes of `records`."""
        numbers = {record.peer_id: number for number, record in enumerate(records)}
        said = [
            (number, numbers[peer_id], ping_s)
            for number, record in enumerate(records)
            for peer_id, ping_s in record.pings_s
            if peer_id in numbers
        ]
        table = np.array(said, dtype=np.float64).reshape(-1, 3)
        return cls(table[:, 0].astype(np.intp), table[:, 1].astype(np.intp), table[:, 2])


class SwarmView:
    """The newest valid record of each node, round trips from here to nodes, and how fast nodes were for this client.

    `said` is what the records say of pings, made when they were read, since it takes longer than to find a route.
    """

    __slots__ = ("own", "pings_s", "records", "said")

    def __init__(
        self,
        records: Sequence[NodeRecord] = (),
        pings_s: Mapping[PeerId, float] | None = None,
        own: Mapping[PeerId, OwnSpeed] | None = None,
        said: SaidPings | None = None,
    ) -> None:
        self.records = records
        self.pings_s = pings_s or {}
        self.own = own or {}
        self.said = SaidPings.of(records) if said is None else said


@dataclass(slots=True)
class _Smoothed:
    value: float
    at_s: float

    def add(self, value: float, now_s: float) -> None:
        self.value += _WEIGHT * (value - self.value)
        self.at_s = now_s


class SwarmKnowledge:
    """Collects what views are made of. All times are of one clock, the swarm's."""

    def __init__(self) -> None:
        self._records: Sequence[NodeRecord] = ()
        self._said = SaidPings.of(())
        self._pings: dict[PeerId, _Smoothed] = {}
        self._speeds: dict[PeerId, _Smoothed] = {}
        self._starts: dict[PeerId, tuple[int, float]] = {}

    @property
    def records(self) -> Sequence[NodeRecord]:
        """As they were read last."""
        return self._records

    def incarnation(self, peer_id: PeerId) -> int:
        """Return that of the node's record; 0 if none was read lately."""
        return self._starts.get(peer_id, (0, 0.0))[0]

    def read(self, records: Iterable[NodeRecord], now_s: float) -> None:
        """Take the records of a look into the directory, of each node its newest.

        A record of an earlier start than is known, which turns up where the newer one cannot be read, is passed over.
        What was measured of a node that restarted is forgotten.
        """
        self._records = tuple(record for record in records if record.incarnation >= self._known_start(record, now_s))
        self._said = SaidPings.of(self._records)
        for record in self._records:
            peer_id = PeerId(record.peer_id)
            if self.incarnation(peer_id) not in (0, record.incarnation):
                self._speeds.pop(peer_id, None)
            self._starts[peer_id] = record.incarnation, now_s
        self._starts = {peer: start for peer, start in self._starts.items() if now_s - start[1] <= START_AGE_S}
        for measured in (self._pings, self._speeds):
            for peer_id in [peer for peer, known in measured.items() if now_s - known.at_s > FORGET_S]:
                del measured[peer_id]

    def _known_start(self, record: NodeRecord, now_s: float) -> int:
        incarnation, seen_s = self._starts.get(PeerId(record.peer_id), (0, 0.0))
        return incarnation if now_s - seen_s <= START_AGE_S else 0

    def pinged(self, peer_id: PeerId, ping_s: float, now_s: float) -> None:
        """Count a round trip to a node."""
        _add(self._pings, peer_id, ping_s, now_s)

    def unreachable(self, peer_id: PeerId) -> None:
        """Forget how far away a node was that does not answer now."""
        self._pings.pop(peer_id, None)

    def stepped(self, peer_id: PeerId, num_blocks: int, step_s: float, now_s: float) -> None:
        """Count a decode step through `num_blocks` blocks that took `step_s` from here and back.

        The node's part is what the ping and the software leave of it; without a ping that cannot be told.
        """
        ping = self._pings.get(peer_id)
        if ping is not None:
            _add(self._speeds, peer_id, max(0.0, step_s - ping.value - HOP_S) / num_blocks, now_s)

    def view(self, now_s: float) -> SwarmView:
        """Return what is known. Its records are those that had not expired when they were read."""
        return SwarmView(
            self._records,
            {peer: ping.value for peer, ping in self._pings.items()},
            {peer: OwnSpeed(speed.value, now_s - speed.at_s <= SPEED_AGE_S) for peer, speed in self._speeds.items()},
            self._said,
        )

    def due_pings(
        self, limit: int, passed_over: Collection[PeerId], now_s: float, shuffle: Callable[[list[PeerId]], object]
    ) -> list[PeerId]:
        """Return up to `limit` nodes whose ping is not known or old: the nearest ones, and some of the others."""
        known: list[PeerId] = []
        unknown: list[PeerId] = []
        for peer_id in sorted(PeerId(record.peer_id) for record in self._records if record.state == "online"):
            ping = self._pings.get(peer_id)
            if peer_id in passed_over:
                continue
            if ping is None:
                unknown.append(peer_id)
            elif now_s - ping.at_s >= PING_AGE_S:
                known.append(peer_id)
        known.sort(key=lambda peer: self._pings[peer].value)
        shuffle(unknown)
        num_nearest = max(limit - len(unknown), limit // 2)
        nearest = known[:num_nearest]
        return nearest + unknown[: limit - len(nearest)]


def _add(known: dict[PeerId, _Smoothed], peer_id: PeerId, value: float, now_s: float) -> None:
    if peer_id in known:
        known[peer_id].add(value, now_s)
    else:
        known[peer_id] = _Smoothed(value, now_s)
