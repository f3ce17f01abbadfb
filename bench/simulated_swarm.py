"""Real nodes and a real client on the network in memory, whose devices and links take the time of a virtual clock.

The model is a thin one: as wide as the one that it stands for, so that hidden states have their true size, with next
to nothing inside of its blocks. What a forward would take on the true device is let pass in its stead.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from server_node.admission import ServedSpan
from server_node.announcer import Announcer
from server_node.compute.block_runner import BlockRunner
from server_node.compute.worker import ComputeWorker
from server_node.config import NodeLimits
from server_node.node import Node, announced
from swarm_client.config import ClientConfig
from swarm_client.prefix_hashes import KEY_BYTES
from swarm_client.routing.find_route import ModelKey
from swarm_client.routing.peer_health import PeerHealth
from swarm_client.routing.watcher import SwarmWatcher
from swarm_client.swarm_session import SwarmSession
from swarm_protocol.errors import StreamLostError
from swarm_protocol.messages import PROTOCOL_VERSIONS
from swarm_protocol.model.checkpoint import open_checkpoint
from swarm_protocol.model.parts import SpanModule, load_span
from swarm_protocol.records import NodeRecord
from swarm_protocol.spans import Span
from swarm_protocol.tape import TapeBudget
from swarm_protocol.transport.memory_net import LinkProfile, MemoryNetwork, MemoryTransport
from swarm_protocol.transport.virtual_clock import EXTERNAL_LIMIT_S, VirtualClockLoop

MODEL, REVISION = "thin", "0123456789abcdef"
CACHE_TOKENS = 100_000
LIMITS = NodeLimits(max_cache_share_per_peer=1.0, headroom_share=0.0)

ForwardTime = Callable[[int, int], float]
"""Seconds that a forward of so many tokens takes behind so many that are cached."""


@contextmanager
def thin_model(hidden_size: int, num_blocks: int) -> Iterator[Path]:
    """Write a random model that is wide and thin; gives its folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden_size, intermediate_size=16, num_hidden_layers=num_blocks, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=16, pad_token_id=None,
    )  # fmt: skip
    with TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        yield Path(folder)


def load_blocks(folder: Path, span: Span) -> SpanModule:
    """Return some blocks of a thin model."""
    return load_span(open_checkpoint(str(folder)), span, dtype=torch.float32, device=torch.device("cpu"))


class SimulatedDevice(ComputeWorker):
    """The real worker, thread and all; a forward takes `forward_s` of the running loop's virtual time."""

    def __init__(self, module: SpanModule, forward_s: ForwardTime) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualClockLoop)
        self._loop = loop
        self._forward_s = forward_s
        super().__init__(ThreadPoolExecutor(1), runner=BlockRunner(module), clock=loop.time)
        assert self._runner is not None
        _ = self._runner.batches.joining  # runs some forwards to see what the model can do, outside of any time
        self._forward = module.forward
        module.forward = self._timed  # type: ignore[method-assign]

    def _timed(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        cache = kwargs.get("cache")
        self._take(self._forward_s(hidden_states.shape[1], 0 if cache is None else cache.get_seq_length()))
        return self._forward(hidden_states, **kwargs)

    def _take(self, seconds: float) -> None:
        """Let so much time pass while the device thread waits, which holds the time otherwise."""
        done = threading.Event()
        self._loop.call_soon_threadsafe(self._let_pass, seconds, done)
        assert done.wait(EXTERNAL_LIMIT_S)

    def _let_pass(self, seconds: float, done: threading.Event) -> None:
        self._loop._num_holds -= 1
        self._loop.call_later(seconds, self._passed, done)

    def _passed(self, done: threading.Event) -> None:
        self._loop._num_holds += 1
        done.set()


@dataclass(frozen=True, slots=True)
class SimulatedNode:
    """A node that runs."""

    transport: MemoryTransport
    node: Node
    device: SimulatedDevice


@dataclass
class SimulatedSwarm:
    """Nodes, the client's transport, and what it takes to make more of both."""

    folder: Path
    network: MemoryNetwork
    client: MemoryTransport
    hidden_size: int
    num_blocks: int
    group: asyncio.TaskGroup
    limits: NodeLimits
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    nodes: dict[str, SimulatedNode] = field(default_factory=dict)
    ended: list[SimulatedNode] = field(default_factory=list)

    async def add_node(self, span: Span, forward_s: ForwardTime) -> SimulatedNode:
        """Start a node and wait until it is online."""
        transport = self.network.transport()
        device = SimulatedDevice(load_blocks(self.folder, span), forward_s)
        record = NodeRecord(
            transport.peer_id, MODEL, REVISION, span.start, span.end, "joining", 1, 0.0, 0.0, PROTOCOL_VERSIONS,
            "umbel bench", "float32", "bench", 0, 0,
        )  # fmt: skip
        announcer = Announcer(transport, self.network.identity(transport.peer_id).sign, record)
        served = ServedSpan(MODEL, REVISION, span, self.hidden_size, "float32", CACHE_TOKENS)
        node = Node(transport, announcer, device, served, self.limits)
        online = asyncio.Event()
        self.group.create_task(_serve(node, announcer, self.stop, online))
        await online.wait()
        self.nodes[transport.peer_id] = made = SimulatedNode(transport, node, device)
        return made

    def forget(self, peer_id: str) -> None:
        """Let a node lose the caches of all of its sessions."""
        self.nodes[peer_id].node.sessions.close_all()

    def kill(self, peer_id: str) -> None:
        """End a node as SIGKILL would."""
        self.ended.append(self.nodes.pop(peer_id))
        self.network.kill(self.ended[-1].transport.peer_id)

    def session(self, config: ClientConfig, max_length: int) -> SwarmSession:
        """Return a session that is not open yet."""
        key = ModelKey(MODEL, REVISION, self.num_blocks)
        watcher = SwarmWatcher(self.client, key, config.view_age_s, PeerHealth(config.avoid_s))
        tapes = TapeBudget(config.tape_bytes)
        return SwarmSession(self.client, watcher, config, key, 1, max_length, b"k" * KEY_BYTES, tapes)


@asynccontextmanager
async def simulated_swarm(
    folder: Path,
    hidden_size: int,
    stages: Sequence[tuple[Span, ForwardTime]],
    link: LinkProfile,
    *,
    has_tapes: bool = True,
) -> AsyncIterator[SimulatedSwarm]:
    """Run a node for each of `stages`; all links are alike. Nodes keep tapes if they are to."""
    network = MemoryNetwork(link)
    limits = LIMITS if has_tapes else replace(LIMITS, tape_bytes=0)
    async with asyncio.TaskGroup() as group:
        swarm = SimulatedSwarm(folder, network, network.transport(), hidden_size, stages[-1][0].end, group, limits)
        for span, forward_s in stages:
            await swarm.add_node(span, forward_s)
        yield swarm
        swarm.stop.set()
    for served in (*swarm.nodes.values(), *swarm.ended):
        await served.transport.close()
        served.device.close()


async def _serve(node: Node, announcer: Announcer, stop: asyncio.Event, online: asyncio.Event) -> None:
    try:
        async with announced(announcer):
            await node.serve(stop, online.set)
    except* StreamLostError:
        pass  # it was killed
