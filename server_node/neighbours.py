"""How far away the nodes are that sessions may go on to from here: holders of the block behind this node's last."""

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Sequence

from server_node.admission import ServedSpan
from server_node.swarm_records import read_records
from swarm_protocol.errors import SwarmError
from swarm_protocol.ids import PeerId, short_peer
from swarm_protocol.ping import measure_ping
from swarm_protocol.records import MAX_PINGS, NodeRecord, Pings
from swarm_protocol.transport.base import Transport

logger = logging.getLogger(__name__)

PERIOD_S = 60.0
"""Between two rounds; ways through the net change within minutes, and a node's neighbours hardly sooner."""

_LOOKUP_S = 20.0
_NUM_KEPT = 5
"""Of the nearest neighbours are measured again; the others of a round are drawn, so that better ones are found."""

_WEIGHT = 0.3


class NeighbourPings:
    """Pings some neighbours again and again. Belongs to the event loop; `run` is to be a task of the owner's."""

    def __init__(self, transport: Transport, served: ServedSpan) -> None:
        self._transport = transport
        self._served = served
        self._known_s: dict[PeerId, float] = {}
        self._rng = random.Random()  # noqa: S311  # which neighbours are pinged is no secret

    @property
    def pings_s(self) -> Pings:
        """The nearest neighbours and the seconds there and back, for the record."""
        nearest = sorted(self._known_s.items(), key=lambda item: (item[1], item[0]))[:MAX_PINGS]
        return tuple((peer_id, round(ping_s, 6)) for peer_id, ping_s in nearest)

    async def run(self) -> None:
        """Look for neighbours and ping them, until cancelled."""
        while True:
            try:
                await self.measure()
            except Exception as error:  # whatever happens below a directory; the next round may go well
                logger.warning("neighbours could not be measured: %r", error)
            await asyncio.sleep(PERIOD_S * self._rng.uniform(0.75, 1.25))  # nodes that start together drift apart

    async def measure(self) -> None:
        """Do one round."""
        neighbours = await self._find()
        self._known_s = {peer: ping_s for peer, ping_s in self._known_s.items() if peer in neighbours}
        chosen = choose_neighbours(neighbours, self._known_s, self._rng.sample)
        await asyncio.gather(*(self._ping(peer_id) for peer_id in chosen))

    async def _find(self) -> list[PeerId]:
        transport, served = self._transport, self._served
        async with asyncio.timeout(_LOOKUP_S):
            records = await read_records(transport, served.model, served.span.end + 1)
        return [peer_id for peer_id in neighbours_among(records, served) if peer_id != transport.peer_id]

    async def _ping(self, peer_id: PeerId) -> None:
        try:
            ping_s = await measure_ping(self._transport, peer_id)
        except SwarmError as error:
            logger.debug("no ping: %s peer=%s", error, short_peer(peer_id))
            self._known_s.pop(peer_id, None)
        else:
            known_s = self._known_s.get(peer_id, ping_s)
            self._known_s[peer_id] = known_s + _WEIGHT * (ping_s - known_s)


def neighbours_among(records: Iterable[NodeRecord], served: ServedSpan) -> list[PeerId]:
    """Return the nodes that a session may go on to from the end of the served span."""
    return sorted(
        {
            PeerId(record.peer_id)
            for record in records
            if record.state == "online"
            and (record.model, record.revision) == (served.model, served.revision)
            and record.start_block <= served.span.end < record.end_block
        }
    )


def choose_neighbours(
    neighbours: Sequence[PeerId],
    known_s: dict[PeerId, float],
    sample: Callable[[Sequence[PeerId], int], list[PeerId]],
) -> list[PeerId]:
    """Return at most `MAX_PINGS` to ping: the nearest that are known, and others that `sample` draws."""
    if len(neighbours) <= MAX_PINGS:
        return list(neighbours)
    nearest = sorted((peer for peer in neighbours if peer in known_s), key=lambda peer: known_s[peer])[:_NUM_KEPT]
    others = [peer for peer in neighbours if peer not in nearest]
    return nearest + sample(others, MAX_PINGS - len(nearest))
