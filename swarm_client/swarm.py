"""A client's connection to a swarm: one event loop, one transport, shared by all models and sessions of a process."""

import asyncio
import atexit
import itertools
import secrets
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from swarm_client.config import ClientConfig
from swarm_client.loop_thread import LoopThread, join_network
from swarm_client.model_swarm import ModelSwarm
from swarm_client.prefix_hashes import KEY_BYTES
from swarm_client.routing.costs import RouteWish
from swarm_client.routing.find_route import Hop, ModelKey, find_throughput_route
from swarm_client.routing.peer_health import PeerHealth
from swarm_client.routing.seen import seen_swarm
from swarm_client.routing.swarm_view import SwarmView
from swarm_client.routing.watcher import SwarmWatcher
from swarm_client.swarm_session import SwarmSession
from swarm_protocol.errors import StepTimeoutError, SwarmError, UnexpectedMessageError, error_from_wire
from swarm_protocol.ids import PeerId, short_peer
from swarm_protocol.message_stream import MessageStream
from swarm_protocol.messages import COMPUTE_PROTOCOL, ErrorReply, Forward, ForwardReply, WireTensor
from swarm_protocol.ping import measure_ping
from swarm_protocol.spans import Span, describe_blocks, uncovered
from swarm_protocol.tape import TapeBudget
from swarm_protocol.transport.base import Transport

_random = secrets.SystemRandom()

_open_swarms: "weakref.WeakSet[Swarm]" = weakref.WeakSet()


class Swarm:
    """The swarm as one client process sees it. Methods may be called from any thread and block."""

    def __init__(self, transport: Transport, loop: LoopThread, config: ClientConfig) -> None:
        """`transport` belongs to the loop of `loop`; both are closed with this. Mostly made by `connect`."""
        self.config = config
        self.loop = loop
        self._transport = transport
        self._prefix_key = secrets.token_bytes(KEY_BYTES)
        self._tapes = TapeBudget(config.tape_bytes)
        self._health = PeerHealth(config.avoid_s)
        self._watchers: dict[ModelKey, SwarmWatcher] = {}
        _open_swarms.add(self)

    @classmethod
    def connect(cls, config: ClientConfig) -> "Swarm":
        """Join the swarm of `config.initial_peers`. Raises PeerUnreachableError or ConfigError."""
        loop = LoopThread()
        try:
            return cls(loop.run(join_network(config)), loop, config)
        except BaseException:
            loop.close()
            raise

    def session(
        self, model: ModelKey, batch_size: int, max_length: int, *, standby: bool | None = None
    ) -> SwarmSession:
        """Return a session that is not yet open; its methods run on `loop`. `standby` None is what the config says."""
        watcher = self._watcher(model)
        config = self.config if standby is None else replace(self.config, standby=standby)
        return SwarmSession(
            self._transport, watcher, config, model, batch_size, max_length, self._prefix_key, self._tapes
        )

    def watch(self, model: ModelKey) -> None:
        """Begin to read which nodes `model` has and how far away they are, so that the first session finds it known."""
        self.loop.submit(self._watcher(model).view())

    def missing_blocks(self, model: ModelKey) -> Sequence[Span]:
        """Return the runs of blocks of `model` that no online node with the same weights serves now."""
        view = self.loop.run(self._watcher(model).view())
        spans = [r.span for r in view.records if r.state == "online" and r.revision == model.revision]
        return uncovered(spans, model.num_blocks)

    def seen(self, model: ModelKey) -> ModelSwarm:
        """Return what is known of the nodes of `model`, for those who show it, from the view that is kept.

        Raises StepTimeoutError if there is no view and the directory does not answer.
        """
        watcher = self._watcher(model)
        view = self.loop.run(watcher.view())
        avoided, failing, now_s = self.loop.run(self._health_of(watcher))
        return seen_swarm(view, model, avoided, failing, now_s)  # in this thread: it takes milliseconds

    def ping(self, peer_id: PeerId) -> float:
        """Dial a peer of the swarm; return the seconds of a round trip. Raises SwarmError if it does not answer."""
        return self.loop.run(measure_ping(self._transport, peer_id))

    def forward(self, model: ModelKey, hidden_states: WireTensor) -> tuple[WireTensor, ...]:
        """Run `hidden_states` (batch, seq, hidden) through all blocks without a cache; return them after every span.

        Raises SwarmError.
        """
        return self.loop.run(self._forward(model, hidden_states))

    def close(self) -> None:
        """Leave the swarm; open sessions end. Idempotent."""
        if self in _open_swarms:
            _open_swarms.discard(self)
            try:
                self.loop.run(self._close())
            finally:
                self.loop.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Swarm":
        """A copy of a model uses the same connection."""
        return self

    def _watcher(self, model: ModelKey) -> SwarmWatcher:
        watcher = self._watchers.get(model)
        if watcher is None:
            watcher = SwarmWatcher(self._transport, model, self.config.view_age_s, self._health)
            watcher = self._watchers.setdefault(model, watcher)
        return watcher

    async def _health_of(self, watcher: SwarmWatcher) -> tuple[frozenset[PeerId], frozenset[PeerId], float]:
        return watcher.avoided, watcher.failing, self._transport.now_s()

    async def _close(self) -> None:
        for watcher in self._watchers.values():
            await watcher.close()
        await self._transport.close()

    async def _forward(self, model: ModelKey, hidden_states: WireTensor) -> tuple[WireTensor, ...]:
        watcher = self._watcher(model)

        def find(view: SwarmView) -> list[Hop]:
            wish = RouteWish(avoided=watcher.avoided, blocked=self.config.blocked_peers)
            return find_throughput_route(view, model, wish, _random.random)

        for attempt in itertools.count(1):
            hops = await watcher.find(find, is_retry=attempt > 1)
            outputs: list[WireTensor] = []
            try:
                for hop in hops:
                    outputs.append(await self._forward_hop(model, hop, outputs[-1] if outputs else hidden_states))
            except SwarmError as error:
                if not error.retryable or attempt >= self.config.route_attempts:
                    raise
                watcher.failed(hops[len(outputs)].peer_id, error)
            else:
                return tuple(outputs)
        raise AssertionError("unreachable")

    async def _forward_hop(self, model: ModelKey, hop: Hop, hidden_states: WireTensor) -> WireTensor:
        request = Forward(1, model.name, model.revision, hop.span.start, hop.span.end, hidden_states)
        try:
            async with asyncio.timeout(self.config.step_s):
                stream = MessageStream(await self._transport.dial(hop.peer_id, COMPUTE_PROTOCOL))
                try:
                    await stream.send(request)
                    reply = await stream.receive()
                finally:
                    await stream.close()
        except TimeoutError:
            raise StepTimeoutError(
                f"{describe_blocks(hop.span)} at {short_peer(hop.peer_id)} took longer than {self.config.step_s:g} s"
            ) from None
        if isinstance(reply, ErrorReply):
            raise error_from_wire(reply.code, reply.message, reply.retryable)
        if not isinstance(reply, ForwardReply) or reply.hidden_states.shape != hidden_states.shape:
            raise UnexpectedMessageError("the node's answer is not what a forward gives")
        return reply.hidden_states


@atexit.register
def _close_all() -> None:
    for swarm in list(_open_swarms):
        swarm.close()
