"""Say in the directory who this node is and what it serves, again and again, until it withdraws."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from server_node.speed import RoutingFacts
from swarm_protocol.errors import InvalidRecordError
from swarm_protocol.ids import PeerId, short_peer
from swarm_protocol.records import RECORD_LIFETIME_S, REFRESH_PERIOD_S, NodeRecord, NodeState, directory_key, seal
from swarm_protocol.spans import Span
from swarm_protocol.transport.base import Transport

logger = logging.getLogger(__name__)

_STORE_TIMEOUT_S = 8.0
"""For one store: below the refresh period, above a lookup of peers that takes a few round trips of 3 s at worst."""

_RETRIES_S = (1.0, 2.0, 4.0, 8.0)
"""After that many failures in a row; from then on the record is refreshed as usual."""

_LATER_S = 0.01
"""The directory replaces a value only by one that expires later."""


class Announcer:
    """The node's record. Belongs to the event loop; `run` is to be a task of the owner's."""

    def __init__(self, transport: Transport, sign: Callable[[bytes], bytes], record: NodeRecord) -> None:
        """`record` says all but its times, the state and the free tokens, which are filled in as it is published."""
        self._transport = transport
        self._sign = sign
        self._record = record
        self._published = record
        self._free_tokens: Callable[[], int] = lambda: 0
        self._facts: Callable[[], RoutingFacts] = RoutingFacts
        self._expires_at_s = 0.0
        self._num_failures = 0

    @property
    def state(self) -> NodeState:
        return self._record.state

    @property
    def published(self) -> NodeRecord:
        """The record as it was published last, or was to be."""
        return self._published

    def serving(self, max_tokens: int, free_tokens: Callable[[], int], facts: Callable[[], RoutingFacts]) -> None:
        """From now on the record names the cache, `max_tokens` in all, and what the others say each time."""
        self._record = replace(self._record, max_tokens=max_tokens)
        self._free_tokens, self._facts = free_tokens, facts

    async def announce(self, state: NodeState, next_span: Span | None = None) -> bool:
        """Publish the record with a new state; False if the directory did not take it, which `run` tries again.

        `next_span` is what a draining node is about to take.
        """
        next_blocks = None if next_span is None else (next_span.start, next_span.end)
        self._record = replace(self._record, state=state, next_blocks=next_blocks)
        logger.info("node is %s peer=%s blocks=%s", state, short_peer(self._peer_id), self._record.span)
        return await self._publish()

    async def move_to(self, span: Span) -> None:
        """Join anew with other blocks: what was said of the old ones is taken back where it stood."""
        old, now_ms = self._record, int(self._transport.now_s() * 1000)
        self._free_tokens, self._facts = lambda: 0, RoutingFacts
        self._record = replace(
            old,
            start_block=span.start,
            end_block=span.end,
            incarnation=max(now_ms, old.incarnation + 1),
            max_tokens=0,
        )
        await self.announce("joining")
        if directory_key(old.model, old.start_block) != directory_key(old.model, span.start):
            # It would expire by itself; sooner is better, and who finds both takes the newer one.
            await self._publish(replace(old, state="offline", next_blocks=None))

    async def run(self) -> None:
        """Refresh the record until cancelled; after a failure sooner than usual. One that is withdrawn stays so."""
        while True:
            is_early = 0 < self._num_failures <= len(_RETRIES_S)
            await asyncio.sleep(_RETRIES_S[self._num_failures - 1] if is_early else REFRESH_PERIOD_S)
            if self.state != "offline":
                await self._publish()

    @property
    def _peer_id(self) -> PeerId:
        return self._transport.peer_id

    async def _publish(self, record: NodeRecord | None = None) -> bool:
        now_s = self._transport.now_s()
        # Two stores may be on their way at once: the one that was begun later has to win, so it expires later.
        self._expires_at_s = max(now_s + RECORD_LIFETIME_S, self._expires_at_s + _LATER_S)
        facts = self._facts()
        record = replace(
            record or self._record,
            published_s=now_s,
            expires_at_s=self._expires_at_s,
            free_tokens=self._free_tokens(),
            block_step_s=facts.block_step_s,
            block_token_s=facts.block_token_s,
            queue_s=facts.queue_s,
            pings_s=facts.pings_s,
            uplink_bytes_per_s=facts.uplink_bytes_per_s,
        )
        if record.state != "offline":
            self._published = record
        key = directory_key(record.model, record.start_block)
        problem: object = "no peer accepted the record"
        try:
            async with asyncio.timeout(_STORE_TIMEOUT_S):
                is_stored = await self._transport.directory.store(
                    key, self._peer_id, self._sealed(record), record.expires_at_s
                )
        except Exception as error:  # a directory passes on whatever happened below it, and a node outlives all of it
            is_stored, problem = False, repr(error)
        self._num_failures = 0 if is_stored else self._num_failures + 1
        if not is_stored:
            logger.warning(
                "the directory did not take the record, failure %d in a row: %s peer=%s",
                self._num_failures, problem, short_peer(self._peer_id),
            )  # fmt: skip
        return is_stored

    def _sealed(self, record: NodeRecord) -> bytes:
        try:
            return seal(record, self._sign)
        except InvalidRecordError:  # names may be long; a node can be found without its pings
            return seal(replace(record, pings_s=()), self._sign)
