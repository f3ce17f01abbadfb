"""A whole swarm in this process: real nodes and a real client on the in-memory network, to test what users call."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from server_node.config import ComputeChoice, ModelChoice, NodeConfig, NodeLimits
from server_node.life import run_node
from server_node.node import Observer, Online
from swarm_client.config import ClientConfig
from swarm_client.loop_thread import LoopThread
from swarm_client.swarm import Swarm
from swarm_protocol.identity import load_identity
from swarm_protocol.ids import PeerId
from swarm_protocol.spans import Span
from swarm_protocol.transport.base import Transport
from swarm_protocol.transport.memory_net import MemoryNetwork
from swarm_protocol.transport.network_config import NetworkConfig

CLIENT_CONFIG = ClientConfig(view_age_s=0.0, open_s=5.0, step_s=20.0, resume_s=1.0)


class LocalSwarm:
    """Nodes for `spans` of the model in `folder`, and a client's `swarm`. Sync; a context manager."""

    def __init__(
        self,
        folder: Path,
        spans: Sequence[Span],
        *,
        cache_tokens: int = 4096,
        prefix_tokens: int | None = None,
        limits: NodeLimits | None = None,
        config: ClientConfig = CLIENT_CONFIG,
    ) -> None:
        self.loop = LoopThread()
        self.nodes: list[PeerId] = []
        self._folder = folder
        self._compute = ComputeChoice(
            dtype="float32", cache_tokens=cache_tokens, prefix_tokens=prefix_tokens, threads=1
        )
        self._limits = limits or NodeLimits(drain_s=1.0, max_cache_share_per_peer=1.0)
        self._tasks: dict[PeerId, tuple[asyncio.Task[None], asyncio.Event]] = {}
        self.network = self.loop.run(self._make_network())
        for span in spans:
            self.add_node(span)
        self.swarm = Swarm(self.loop.run(self._client_transport()), self.loop, config)

    def add_node(self, span: Span) -> PeerId:
        """Start a node and wait until it is online."""
        peer_id = self.loop.run(self._start(span))
        self.nodes.append(peer_id)
        return peer_id

    def kill(self, peer_id: PeerId) -> None:
        """End a node as SIGKILL would."""
        self.loop.run(self._kill(peer_id))

    def stop(self, peer_id: PeerId) -> None:
        """Let a node drain and leave."""
        self.loop.run(self._stop(peer_id))

    def break_streams(self, peer_id: PeerId, after_frames: int = 0) -> None:
        """Let the streams between the client and a node drop."""
        self.loop.run(self._break(peer_id, after_frames))

    def freeze(self, peer_id: PeerId, *, is_frozen: bool) -> None:
        """Stop a node's network as SIGSTOP would, or let it go on."""
        self.loop.run(self._freeze(peer_id, is_frozen))

    def __enter__(self) -> "LocalSwarm":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for peer_id in list(self._tasks):
            self.kill(peer_id)
        self.swarm.close()

    async def _make_network(self) -> MemoryNetwork:
        return MemoryNetwork()

    async def _client_transport(self) -> Transport:
        self.client_id = (transport := self.network.transport()).peer_id
        return transport

    async def _start(self, span: Span) -> PeerId:
        online: asyncio.Future[PeerId] = asyncio.get_running_loop().create_future()
        started: list[PeerId] = []

        async def open_network(network: NetworkConfig) -> Transport:
            peer_id = load_identity(Path(str(network.identity_path))).peer_id
            started.append(peer_id)
            return self.network.transport(peer_id)

        def on_online(_: Online) -> None:
            online.set_result(started[0])

        config = NodeConfig(
            ModelChoice(str(self._folder), blocks=span),
            self._compute,
            limits=self._limits,
        )
        stop = asyncio.Event()
        task = asyncio.create_task(run_node(config, stop, Observer(lambda *_: None, on_online), open_network))
        await asyncio.wait([task, online], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        self._tasks[started[0]] = (task, stop)
        return online.result()

    async def _kill(self, peer_id: PeerId) -> None:
        task, _ = self._tasks.pop(peer_id)
        if self.network.online(peer_id) is not None:
            self.network.kill(peer_id)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def _stop(self, peer_id: PeerId) -> None:
        task, stop = self._tasks.pop(peer_id)
        stop.set()
        await task

    async def _freeze(self, peer_id: PeerId, is_frozen: bool) -> None:
        (self.network.freeze if is_frozen else self.network.thaw)(peer_id)

    async def _break(self, peer_id: PeerId, after_frames: int) -> None:
        self.network.break_streams(self.client_id, peer_id, after_frames=after_frames)
