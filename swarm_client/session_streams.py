"""Opens a session's streams at the nodes of a route, and knows which nodes failed it."""

import asyncio
import logging
import secrets
from collections.abc import Callable, Collection, Sequence
from functools import partial

from swarm_client.config import ClientConfig
from swarm_client.leg import Leg
from swarm_client.node_line import HopLimits
from swarm_client.prefix_hashes import TokenPrefix, page_hashes
from swarm_client.routing.costs import RouteWish, Way
from swarm_client.routing.find_route import Hop, ModelKey, find_route
from swarm_client.routing.swarm_view import SwarmView
from swarm_client.routing.watcher import SwarmWatcher
from swarm_client.span_stream import SpanStream
from swarm_client.wire_choice import choose_wire_dtype
from swarm_protocol.errors import ProtocolError, SwarmError
from swarm_protocol.ids import ID_BYTES, PeerId, short_id, short_peer
from swarm_protocol.records import NodeRecord
from swarm_protocol.spans import Span
from swarm_protocol.transport.base import Transport

logger = logging.getLogger(__name__)


class SessionStreams:
    """Finds routes for one session of `batch_size` rows and opens streams along them. Belongs to the event loop.

    `prefix_key` is what the client keys its hashes of tokens with.
    """

    def __init__(
        self,
        transport: Transport,
        watcher: SwarmWatcher,
        config: ClientConfig,
        model: ModelKey,
        batch_size: int,
        max_length: int,
        prefix_key: bytes,
        on_silent: Callable[[Hop], None],
    ) -> None:
        """`on_silent` is told of a hop whose node is waited for, since nobody could replace it."""
        self._transport = transport
        self._watcher = watcher
        self._config = config
        self._model = model
        self._batch_size = batch_size
        self._max_length = max_length
        self._prefix_key = prefix_key
        self._on_silent = on_silent
        self._limits = HopLimits(config.open_s, config.step_s, config.resume_s, config.reserve_tokens)
        self._failed_s: dict[PeerId, float] = {}
        """When a node failed this session, on the swarm's clock: it is not asked again before it says that it lives."""
        self._endings: set[asyncio.Task[None]] = set()

    async def find_route(
        self,
        reserved: int,
        pages: Sequence[bytes] = (),
        span: Span | None = None,
        *,
        without: PeerId | None = None,
        is_retry: bool = False,
        twins_of: Hop | None = None,
        passed_over: Collection[PeerId] = (),
    ) -> list[Hop]:
        """Return a route for `reserved` tokens through `span`, None for all blocks, that leaves out some nodes.

        With `twins_of` it is of one node, to which the keys and values of that hop can be copied.

        Raises MissingBlocksError and the like.
        """

        def find(view: SwarmView) -> list[Hop]:
            peers = [(PeerId(record.peer_id), record.published_s) for record in view.records]
            unfit = {peer for peer, published_s in peers if span is not None and not self._may_serve(peer, published_s)}
            unfit |= self._config.blocked_peers | ({without} if without is not None else set())
            unfit |= set(passed_over)
            if twins_of is not None:
                unfit |= {PeerId(record.peer_id) for record in view.records if not _is_twin(record, twins_of)}
            wish = RouteWish(
                self._batch_size * reserved, self._watcher.avoided, unfit, self._watcher.holders.affinity(pages),
                Way.RING, span=span,
            )  # fmt: skip
            return find_route(view, self._model, wish, secrets.choice)

        return await self._watcher.find(find, is_retry=is_retry)

    async def open(
        self,
        hops: Sequence[Hop],
        reserved: int,
        prefix: TokenPrefix | None = None,
        *,
        upstream: PeerId | None = None,
        downstream: PeerId | None = None,
        step_number: int = 0,
    ) -> tuple[list[Leg], int]:
        """Open a session at every hop; return the legs, and how many tokens of `prefix` all of them have.

        `upstream` and `downstream` are the nodes before and behind all of them. Raises SwarmError; the nodes at fault
        are avoided then.
        """
        session_id = secrets.token_bytes(ID_BYTES)
        around = [upstream, *(hop.peer_id for hop in hops), downstream]
        streams = [
            SpanStream(
                self._transport, hop, session_id, self._max_length, self._limits, partial(self._is_replaceable, hop)
            )
            for hop in hops
        ]
        try:
            results = await asyncio.gather(
                *(
                    stream.open(
                        self._model,
                        self._batch_size,
                        reserved,
                        self.hashes(hops[: number + 1], prefix),
                        upstream=around[number],
                        downstream=around[number + 2],
                    )
                    for number, stream in enumerate(streams)
                ),
                return_exceptions=True,
            )
        except asyncio.CancelledError:
            await asyncio.gather(*(stream.close() for stream in streams))
            raise
        failures = [(s, r) for s, r in zip(streams, results, strict=True) if isinstance(r, BaseException)]
        if not failures:
            route = " → ".join(f"{short_peer(hop.peer_id)}[{hop.span}]" for hop in hops)
            cached = min(result for result in results if isinstance(result, int))
            logger.info("session opened, %d tokens cached: %s session=%s", cached, route, short_id(session_id))
            return [Leg(stream, around[number], step_number) for number, stream in enumerate(streams)], cached
        for stream, error in failures:
            if isinstance(error, SwarmError) and is_nodes_fault(error):
                self.blame(stream.hop.peer_id, error)
        await asyncio.gather(*(stream.close() for stream in streams))
        raise failures[0][1]

    def wire_dtype(self, hops: Sequence[Hop], own: str) -> str:
        """Return the dtype in which states go through `hops` that this client has in `own`."""
        config = self._config
        return choose_wire_dtype(config.wire_dtype, hops, self._model.family, own, config.slow_bytes_per_s)

    def hashes(self, hops: Sequence[Hop], prefix: TokenPrefix | None) -> tuple[bytes, ...]:
        """Return the names of the prefix's pages at the last of these hops, the first of the route."""
        return page_hashes(self._prefix_key, self._model, hops, prefix) if prefix is not None else ()

    def blame(self, peer_id: PeerId, error: SwarmError) -> None:
        """A node failed: neither this session nor others ask it again before it proves alive."""
        self._failed_s[peer_id] = self._transport.now_s()
        self._watcher.failed(peer_id, error)

    def end(self, stream: SpanStream) -> None:
        """Close a stream without waiting for it: its node may be gone."""
        ending = asyncio.create_task(stream.close(), name="stream-end")
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)

    async def close(self) -> None:
        """Give up the streams that are being ended."""
        for ending in self._endings:
            ending.cancel()
        await asyncio.gather(*self._endings, return_exceptions=True)

    def _may_serve(self, peer_id: PeerId, published_s: float) -> bool:
        return published_s > self._failed_s.get(peer_id, float("-inf"))

    async def _is_replaceable(self, hop: Hop) -> bool:
        """Whether other nodes, none of which failed lately, serve the blocks of `hop`."""
        away = {hop.peer_id, *self._watcher.avoided, *self._config.blocked_peers}
        try:
            find_route(await self._watcher.view(), self._model, RouteWish(blocked=away, span=hop.span), secrets.choice)
        except SwarmError:
            self._watcher.look_soon()  # there may be one that has just come
            self._on_silent(hop)
            return False
        return True


def _is_twin(record: NodeRecord, hop: Hop) -> bool:
    return record.span.contains(hop.span) and record.numerics == hop.numerics


def is_nodes_fault(error: SwarmError) -> bool:
    """Whether another node may do better: it refused for now, failed, or does not keep to the protocol."""
    return error.retryable or isinstance(error, ProtocolError)
