"""A session over a whole route: hops in a row, opened together. Belongs to the event loop."""

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from swarm_client.config import ClientConfig
from swarm_client.prefix_hashes import TokenPrefix, page_hashes
from swarm_client.routing.find_route import Hop, ModelKey, find_route
from swarm_client.routing.watcher import SwarmWatcher
from swarm_client.span_stream import HopLimits, SpanStream, tokens_to_reserve
from swarm_protocol.errors import CacheFullError, ProtocolError, SessionClosedError, SwarmError
from swarm_protocol.ids import ID_BYTES, short_id, short_peer
from swarm_protocol.messages import WireTensor
from swarm_protocol.transport.base import Transport

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HopTiming:
    """Where one step's time went at one hop, in seconds; what is left of `total_s` is the wire."""

    hop: Hop
    total_s: float
    queue_s: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class StepResult:
    """The hidden states (batch, seq, hidden) after every span of the route, and the time at each hop."""

    outputs: tuple[WireTensor, ...]
    timings: tuple[HopTiming, ...]


class SwarmSession:
    """KV caches for `batch_size` rows of up to `max_length` tokens at every node of a route; they grow with the rows.

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
    ) -> None:
        self._transport = transport
        self._watcher = watcher
        self._config = config
        self._model = model
        self._batch_size = batch_size
        self._max_length = max_length
        self._prefix_key = prefix_key
        self._limits = HopLimits(config.open_s, config.step_s, config.resume_s, config.reserve_tokens)
        self._hops: list[SpanStream] = []

    @property
    def route(self) -> Sequence[Hop]:
        """The hops in the order of their blocks; empty until opened."""
        return [stream.hop for stream in self._hops]

    async def open(self, num_tokens: int, prefix: TokenPrefix | None = None) -> int:
        """Find a route and reserve the caches for `num_tokens` tokens and some more.

        Returns how many tokens of `prefix` are cached at every node, where steps may start. Nodes that fail are
        avoided, and another route is tried. Raises what the last try raised: MissingBlocksError, CacheFullError,
        PeerUnreachableError and the like.
        """
        reserved = tokens_to_reserve(num_tokens, self._config.reserve_tokens, self._max_length)
        for attempt in range(1, self._config.route_attempts + 1):
            records = await self._watcher.records(0.0 if attempt > 1 else self._config.view_age_s)
            hops = find_route(
                [r for r in records if r.peer_id not in self._config.blocked_peers],
                self._model,
                needed_tokens=self._batch_size * reserved,
                avoided=self._watcher.avoided,
                choose=secrets.choice,
            )
            try:
                return await self._open_hops(hops, reserved, prefix)
            except SwarmError as error:
                if not _is_nodes_fault(error) or attempt == self._config.route_attempts:
                    raise
                if isinstance(error, CacheFullError):
                    reserved = num_tokens  # what is needed now may still fit
                logger.info("route failed, trying another (%s): %s", attempt, error)
        raise AssertionError("unreachable")

    async def step(
        self, hidden_states: WireTensor, position: int, row_order: tuple[int, ...] | None = None
    ) -> StepResult:
        """Run `hidden_states` (batch, seq, hidden) through all hops at `position`, as `messages.Step` says.

        Cancelling loses nothing: the next step may go on at any position that was cached before. Raises SwarmError.
        """
        if not self._hops:
            raise SessionClosedError("the session is closed; open a new one")
        outputs, timings = [], []
        for stream in self._hops:
            started_s = time.perf_counter()
            try:
                reply = await stream.step(hidden_states, position, row_order)
            except SwarmError as error:
                if _is_nodes_fault(error):
                    self._watcher.avoid(stream.hop.peer_id)
                raise
            hidden_states = reply.hidden_states
            outputs.append(hidden_states)
            timings.append(HopTiming(stream.hop, time.perf_counter() - started_s, reply.queue_s, reply.compute_s))
        return StepResult(tuple(outputs), tuple(timings))

    async def close(self) -> None:
        """Free the caches at every node. Idempotent."""
        hops, self._hops = self._hops, []
        await asyncio.gather(*(stream.close() for stream in hops))

    async def _open_hops(self, hops: Sequence[Hop], reserved: int, prefix: TokenPrefix | None) -> int:
        session_id = secrets.token_bytes(ID_BYTES)
        streams = [SpanStream(self._transport, hop, session_id, self._max_length, self._limits) for hop in hops]
        try:
            results = await asyncio.gather(
                *(
                    stream.open(self._model, self._batch_size, reserved, self._hashes(hops[: number + 1], prefix))
                    for number, stream in enumerate(streams)
                ),
                return_exceptions=True,
            )
        except asyncio.CancelledError:
            await asyncio.gather(*(stream.close() for stream in streams))
            raise
        failures = [(s, r) for s, r in zip(streams, results, strict=True) if isinstance(r, BaseException)]
        if not failures:
            self._hops = streams
            route = " → ".join(f"{short_peer(hop.peer_id)}[{hop.span}]" for hop in hops)
            cached = min(result for result in results if isinstance(result, int))
            logger.info("session opened, %d tokens cached: %s session=%s", cached, route, short_id(session_id))
            return cached
        for stream, error in failures:
            if isinstance(error, SwarmError) and _is_nodes_fault(error):
                self._watcher.avoid(stream.hop.peer_id)
        await asyncio.gather(*(stream.close() for stream in streams))
        raise failures[0][1]

    def _hashes(self, hops: Sequence[Hop], prefix: TokenPrefix | None) -> tuple[bytes, ...]:
        return page_hashes(self._prefix_key, self._model, hops, prefix) if prefix is not None else ()


def _is_nodes_fault(error: SwarmError) -> bool:
    """Whether another node may do better: it refused for now, failed, or does not keep to the protocol."""
    return error.retryable or isinstance(error, ProtocolError)
