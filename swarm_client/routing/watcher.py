"""What the swarm looks like now: directory records, verified, and the peers that failed lately."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from swarm_protocol.errors import InvalidRecordError, StepTimeoutError
from swarm_protocol.identity import verify
from swarm_protocol.ids import PeerId, parse_peer_id, short_peer
from swarm_protocol.records import NodeRecord, directory_keys, unseal
from swarm_protocol.transport.base import Transport

logger = logging.getLogger(__name__)

LOOKUP_S = 20.0
"""For one look into the directory: some rounds of calls to peers, of which each may take seconds to be given up."""


class SwarmWatcher:
    """The nodes of one model. Belongs to the event loop of `transport`."""

    def __init__(
        self,
        transport: Transport,
        model: str,
        num_blocks: int,
        avoid_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport = transport
        self._keys = directory_keys(model, num_blocks)
        self._model = model
        self._avoid_s = avoid_s
        self._clock = clock
        self._records: Sequence[NodeRecord] = ()
        self._read_at_s = float("-inf")
        self._avoided: dict[PeerId, float] = {}

    async def records(self, max_age_s: float) -> Sequence[NodeRecord]:
        """Return the verified records of the model's nodes, read at most `max_age_s` ago. Raises StepTimeoutError."""
        if self._clock() - self._read_at_s > max_age_s:
            try:
                async with asyncio.timeout(LOOKUP_S):
                    self._records = await self._read()
            except TimeoutError:
                raise StepTimeoutError(f"the directory of {self._model} took longer than {LOOKUP_S:g} s") from None
            self._read_at_s = self._clock()
        return self._records

    def avoid(self, peer_id: PeerId) -> None:
        """Choose another node than `peer_id` for a while."""
        self._avoided[peer_id] = self._clock() + self._avoid_s

    @property
    def avoided(self) -> frozenset[PeerId]:
        """The peers that failed lately."""
        now_s = self._clock()
        self._avoided = {peer: until_s for peer, until_s in self._avoided.items() if until_s > now_s}
        return frozenset(self._avoided)

    async def _read(self) -> Sequence[NodeRecord]:
        found = await self._transport.directory.lookup(self._keys)
        newest: dict[str, NodeRecord] = {}
        for values in found.values():
            for subkey, value in values.items():
                try:
                    record = unseal(value, parse_peer_id(subkey), verify, self._transport.now_s())
                except (InvalidRecordError, ValueError) as error:
                    logger.debug("ignored a record: %s", error)
                    continue
                known = newest.get(record.peer_id)
                if record.model == self._model and (known is None or known.published_s < record.published_s):
                    newest[record.peer_id] = record
        logger.debug("%d nodes of %s: %s", len(newest), self._model, [short_peer(PeerId(p)) for p in newest])
        return list(newest.values())
