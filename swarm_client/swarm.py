"""A client's connection to a swarm: one event loop, one transport, shared by all models and sessions of a process."""

import atexit
import secrets
import weakref
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from swarm_client.config import ClientConfig
from swarm_client.generation.speculation import check_draft_quantization, check_speculation
from swarm_client.loop_thread import LoopThread, join_network
from swarm_client.model_swarm import ModelSwarm
from swarm_client.passes import Passes, Visit
from swarm_client.prefix_hashes import KEY_BYTES
from swarm_client.routing.find_route import ModelKey
from swarm_client.routing.peer_health import PeerHealth
from swarm_client.routing.seen import seen_swarm
from swarm_client.routing.watcher import SwarmWatcher
from swarm_client.swarm_session import SwarmSession
from swarm_client.wire_choice import check_choice
from swarm_protocol.ids import PeerId
from swarm_protocol.messages import WireTensor
from swarm_protocol.ping import measure_ping
from swarm_protocol.spans import Span, uncovered
from swarm_protocol.tape import TapeBudget
from swarm_protocol.transport.base import Transport

T = TypeVar("T")

_open_swarms: "weakref.WeakSet[Swarm]" = weakref.WeakSet()


class Swarm:
    """The swarm as one client process sees it. Methods may be called from any thread and block."""

    def __init__(self, transport: Transport, loop: LoopThread, config: ClientConfig) -> None:
        """`transport` belongs to the loop of `loop`; both are closed with this. Mostly made by `connect`."""
        check_choice(config.wire_dtype)
        check_speculation(config.speculation)
        check_draft_quantization(config.draft_quantization)
        self.config = config
        self.loop = loop
        self._transport = transport
        self._prefix_key = secrets.token_bytes(KEY_BYTES)
        self._tapes = TapeBudget(config.tape_bytes)
        self._health = PeerHealth(config.avoid_s)
        self._watchers: dict[ModelKey, SwarmWatcher] = {}
        self._passes: dict[ModelKey, Passes] = {}
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

    def forward(
        self, model: ModelKey, pieces: Sequence[WireTensor], *, is_one_route: bool = False
    ) -> list[list[Visit]]:
        """Run micro-batches (batch, seq, hidden) through all blocks without a cache; return the visits of each.

        With `is_one_route` all go through the same spans, unless a node fails. Raises SwarmError.
        """
        return self.loop.run(self._passes_of(model, lambda passes: passes.forward(pieces, is_one_route=is_one_route)))

    def backward(
        self, model: ModelKey, passed: Sequence[Sequence[Visit]], gradients: Sequence[WireTensor]
    ) -> list[WireTensor]:
        """Return the gradients of what `forward` was given, for those of what it gave. Raises SwarmError."""
        return self.loop.run(self._passes_of(model, lambda passes: passes.backward(passed, gradients)))

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
        for passes in self._passes.values():
            await passes.close()
        for watcher in self._watchers.values():
            await watcher.close()
        await self._transport.close()

    async def _passes_of(self, model: ModelKey, use: Callable[[Passes], Coroutine[Any, Any, T]]) -> T:
        passes = self._passes.get(model)
        if passes is None:
            passes = self._passes[model] = Passes(self._transport, self._watcher(model), self.config, model)
        return await use(passes)


@atexit.register
def _close_all() -> None:
    for swarm in list(_open_swarms):
        swarm.close()
