"""Nodes and a client's session over them on the network in memory, with a tiny random model and a fake clock."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from server_node.admission import ServedSpan
from server_node.announcer import Announcer
from server_node.compute.block_runner import BlockRunner
from server_node.compute.work import StepWork, Work
from server_node.compute.worker import ComputeWorker
from server_node.config import NodeLimits
from server_node.node import Node, announced
from swarm_client.config import ClientConfig
from swarm_client.prefix_hashes import KEY_BYTES
from swarm_client.routing.find_route import ModelKey
from swarm_client.routing.peer_health import PeerHealth
from swarm_client.routing.watcher import SwarmWatcher
from swarm_client.swarm_session import SwarmSession
from swarm_protocol.errors import (
    StreamLostError,
)
from swarm_protocol.messages import (
    SESSION_PROTOCOL,
)
from swarm_protocol.model.checkpoint import open_checkpoint
from swarm_protocol.model.parts import SpanModule, load_span
from swarm_protocol.records import directory_key, seal
from swarm_protocol.spans import Span
from swarm_protocol.tape import TapeBudget
from swarm_protocol.tensors import from_wire, to_wire
from swarm_protocol.transport.base import FrameStream
from swarm_protocol.transport.memory_net import LinkProfile, MemoryNetwork, MemoryTransport
from tests.node.node_scenario import (
    HIDDEN,
    MODEL,
    REVISION,
    Conversation,
    InlineExecutor,
    node_record,
)
from tests.tiny_models import NUM_BLOCKS, save_tiny_model

KEY = ModelKey(MODEL, REVISION, NUM_BLOCKS)
CONFIG = ClientConfig(open_s=5.0, step_s=20.0, resume_s=8.0, view_age_s=0.0)
HALVES = (Span(0, 2), Span(2, NUM_BLOCKS))
WHOLE = Span(0, NUM_BLOCKS)
PREFIX_KEY = b"k" * KEY_BYTES


@cache
def span_module(span: Span) -> SpanModule:
    with TemporaryDirectory() as folder:
        save_tiny_model("llama", Path(folder))
        return load_span(open_checkpoint(folder), span, dtype=torch.float32, device=torch.device("cpu"))


class CountingWorker(ComputeWorker):
    """Counts the steps that it computes, and their tokens."""

    def __init__(self, span: Span) -> None:
        super().__init__(InlineExecutor(), runner=BlockRunner(span_module(span)))
        self.span = span
        self.num_steps = 0
        self.num_tokens = 0

    async def run(self, work: Work) -> Any:  # type: ignore[override]
        if isinstance(work, StepWork):
            self.num_steps += 1
            self.num_tokens += work.hidden_states.shape[1]
        return await super().run(work)


@dataclass
class Served:
    """A node that runs."""

    transport: MemoryTransport
    node: Node
    worker: CountingWorker
    stop: asyncio.Event

    @property
    def tapes(self) -> TapeBudget:
        """What this node keeps of what it sends on."""
        return self.node.sessions.tapes


@dataclass
class Scene:
    """Nodes, a client's session over them that is not open yet, and the script's hands."""

    network: MemoryNetwork
    client: MemoryTransport
    session: SwarmSession
    nodes: list[Served]
    group: asyncio.TaskGroup
    tapes: TapeBudget = field(default_factory=lambda: TapeBudget(1 << 20))

    def set_delay(self, first: MemoryTransport, second: MemoryTransport, delay_s: float) -> None:
        """Let frames between two peers take so long."""
        self.network.set_link(first.peer_id, second.peer_id, LinkProfile(delay_s))

    async def steps(self, hidden_states: torch.Tensor, first: int = 0) -> torch.Tensor:
        """One step for each column, at positions from `first` on."""
        outputs = []
        for column in range(hidden_states.shape[1]):
            result = await self.session.step(to_wire(hidden_states[:, column : column + 1]), first + column)
            outputs.append(from_wire(result.outputs[-1]))
        return torch.cat(outputs, dim=1)

    async def add_node(self, span: Span, numerics: str = "test") -> Served:
        """Start one more node."""
        self.nodes.append(served := await start_node(self.network, span, self.group, numerics))
        return served

    def kill(self, index: int) -> None:
        """End a node as SIGKILL would."""
        self.network.kill(self.nodes[index].transport.peer_id)

    def another_session(self, config: ClientConfig = CONFIG, max_length: int = 20, batch_size: int = 1) -> SwarmSession:
        watcher = SwarmWatcher(self.client, KEY, config.view_age_s, PeerHealth(config.avoid_s))
        return SwarmSession(self.client, watcher, config, KEY, batch_size, max_length, PREFIX_KEY, self.tapes)


@asynccontextmanager
async def scene(*spans: Span, config: ClientConfig = CONFIG, max_length: int = 20) -> AsyncIterator[Scene]:
    network = MemoryNetwork()
    async with asyncio.TaskGroup() as group:
        nodes = [await start_node(network, span, group) for span in spans]
        client = network.transport()
        made = Scene(network, client, None, nodes, group)  # type: ignore[arg-type]
        made.session = made.another_session(config, max_length)
        yield made
        await made.session.close()
        for served in nodes:
            served.stop.set()
    for served in nodes:
        await served.transport.close()


async def start_node(
    network: MemoryNetwork,
    span: Span,
    group: asyncio.TaskGroup,
    numerics: str = "test",
    transport: MemoryTransport | None = None,
    incarnation: int = 1,
) -> Served:
    """Start a node and wait until it is online; `transport` is that of a peer that was there before."""
    transport = transport or network.transport()
    worker = CountingWorker(span)
    record = replace(
        node_record(transport),
        start_block=span.start,
        end_block=span.end,
        numerics=numerics,
        incarnation=incarnation,
    )
    announcer = Announcer(transport, network.identity(transport.peer_id).sign, record)
    served = ServedSpan(MODEL, REVISION, span, HIDDEN, "float32", 400, numerics)
    node = Node(transport, announcer, worker, served, NodeLimits())
    stop, online = asyncio.Event(), asyncio.Event()
    group.create_task(serve(node, announcer, stop, online))
    await online.wait()
    return Served(transport, node, worker, stop)


async def serve(node: Node, announcer: Announcer, stop: asyncio.Event, online: asyncio.Event) -> None:
    try:
        async with announced(announcer):
            await node.serve(stop, online.set)
    except* StreamLostError:
        pass  # it was killed


Answer = Callable[[Conversation, Any], Awaitable[None]]


async def add_scripted_node(network: MemoryNetwork, answer: Answer, span: Span = WHOLE) -> MemoryTransport:
    """A peer that says that it serves `span` and answers every message as `answer` does."""
    transport = network.transport()

    async def handle(stream: FrameStream) -> None:
        talk = Conversation(stream)
        while True:
            await answer(talk, await talk.receive())

    await transport.serve(SESSION_PROTOCOL, handle)
    record = replace(
        node_record(transport),
        start_block=span.start,
        end_block=span.end,
        state="online",
        expires_at_s=network.now_s() + 30,
        free_tokens=1000,
    )
    value = seal(record, network.identity(transport.peer_id).sign)
    await transport.directory.store(directory_key(MODEL, span.start), transport.peer_id, value, record.expires_at_s)
    return transport


def local_output(hidden_states: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        for span in HALVES:
            hidden_states = span_module(span)(hidden_states)
    return hidden_states


def now_s() -> float:
    return asyncio.get_running_loop().time()
