"""A client's session against real and broken nodes on the network in memory; no test waits for real time."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from server_node.admission import ServedSpan
from server_node.announcer import Announcer
from server_node.compute.block_runner import BlockRunner
from server_node.compute.work import StepWork, Work
from server_node.compute.worker import ComputeWorker
from server_node.config import NodeLimits
from server_node.node import Node
from swarm_client.config import ClientConfig
from swarm_client.inference_session import _open_together
from swarm_client.prefix_hashes import KEY_BYTES
from swarm_client.routing.find_route import ModelKey
from swarm_client.routing.watcher import LOOKUP_S, SwarmWatcher
from swarm_client.span_stream import RESUME_PAUSE_S
from swarm_client.swarm_session import SwarmSession
from swarm_protocol.errors import (
    CacheFullError,
    MissingBlocksError,
    ProtocolError,
    SessionClosedError,
    StepTimeoutError,
    StreamLostError,
)
from swarm_protocol.messages import (
    SESSION_PROTOCOL,
    OpenSession,
    ResumeSession,
    SessionOpened,
    SessionResumed,
    Step,
    StepReply,
    error_reply,
)
from swarm_protocol.model.checkpoint import open_checkpoint
from swarm_protocol.model.parts import SpanModule, load_span
from swarm_protocol.records import directory_key, seal
from swarm_protocol.spans import Span
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
    settle,
    states,
    virtual,
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
    """Counts the steps that it computes."""

    def __init__(self, span: Span) -> None:
        super().__init__(InlineExecutor(), runner=BlockRunner(span_module(span)))
        self.num_steps = 0

    async def run(self, work: Work) -> Any:  # type: ignore[override]
        self.num_steps += isinstance(work, StepWork)
        return await super().run(work)


@dataclass
class Served:
    """A node that runs."""

    transport: MemoryTransport
    node: Node
    worker: CountingWorker


@dataclass
class Scene:
    """Nodes, a client's session over them that is not open yet, and the script's hands."""

    network: MemoryNetwork
    client: MemoryTransport
    session: SwarmSession
    nodes: list[Served]

    async def steps(self, hidden_states: torch.Tensor, first: int = 0) -> torch.Tensor:
        """One step for each column, at positions from `first` on."""
        outputs = []
        for column in range(hidden_states.shape[1]):
            result = await self.session.step(to_wire(hidden_states[:, column : column + 1]), first + column)
            outputs.append(from_wire(result.outputs[-1]))
        return torch.cat(outputs, dim=1)

    def another_session(self, config: ClientConfig = CONFIG) -> SwarmSession:
        watcher = SwarmWatcher(self.client, KEY.name, KEY.num_blocks, config.avoid_s)
        return SwarmSession(self.client, watcher, config, KEY, 1, 20, PREFIX_KEY)


@asynccontextmanager
async def scene(*spans: Span, config: ClientConfig = CONFIG) -> AsyncIterator[Scene]:
    network = MemoryNetwork()
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        nodes = [await start_node(network, span, stop, group) for span in spans]
        client = network.transport()
        made = Scene(network, client, None, nodes)  # type: ignore[arg-type]
        made.session = made.another_session(config)
        yield made
        await made.session.close()
        stop.set()
    for served in nodes:
        await served.transport.close()


async def start_node(network: MemoryNetwork, span: Span, stop: asyncio.Event, group: asyncio.TaskGroup) -> Served:
    transport = network.transport()
    worker = CountingWorker(span)
    record = replace(node_record(transport), start_block=span.start, end_block=span.end)
    announcer = Announcer(transport, network.identity(transport.peer_id).sign, record)
    node = Node(transport, announcer, worker, ServedSpan(MODEL, REVISION, span, HIDDEN, "float32", 400), NodeLimits())
    online = asyncio.Event()
    group.create_task(serve(node, stop, online))
    await online.wait()
    return Served(transport, node, worker)


async def serve(node: Node, stop: asyncio.Event, online: asyncio.Event) -> None:
    try:
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


@virtual
async def test_a_frozen_node_times_out_exactly_at_the_deadline() -> None:
    async with scene(*HALVES) as s:
        await s.session.open(1)
        s.network.freeze(s.nodes[1].transport.peer_id)
        started_s = now_s()
        with pytest.raises(StepTimeoutError) as caught:
            await s.steps(states(1))
        assert now_s() - started_s == pytest.approx(CONFIG.step_s, abs=1e-6)
        assert caught.value.retryable
        s.network.thaw(s.nodes[1].transport.peer_id)
        torch.testing.assert_close(await s.steps(states(4)), local_output(states(4)), rtol=1e-5, atol=1e-5)


@virtual
async def test_a_step_takes_one_round_trip_to_each_node() -> None:
    async with scene(*HALVES) as s:
        for served, delay_s in zip(s.nodes, (0.02, 0.05), strict=True):
            s.network.set_link(s.client.peer_id, served.transport.peer_id, LinkProfile(delay_s))
        started_s = now_s()
        await s.session.open(1)
        assert now_s() - started_s == pytest.approx(4 * 0.05)  # both at once: a dial and a question
        started_s = now_s()
        await s.steps(states(3))
        assert now_s() - started_s == pytest.approx(3 * 2 * (0.02 + 0.05))


@pytest.mark.parametrize("after_frames", range(20))
@pytest.mark.parametrize("hop", [0, 1])
@virtual
async def test_a_stream_may_drop_at_any_frame(hop: int, after_frames: int) -> None:
    async with scene(*HALVES) as s:
        await s.session.open(1)
        s.network.break_streams(s.client.peer_id, s.nodes[hop].transport.peer_id, after_frames=after_frames)
        found = await s.steps(states(10))
        torch.testing.assert_close(found, local_output(states(10)), rtol=1e-5, atol=1e-5)
        assert [served.worker.num_steps for served in s.nodes] == [10, 10]


@virtual
async def test_a_killed_node_is_a_retryable_error_within_the_time_of_a_resume() -> None:
    async with scene(*HALVES) as s:
        await s.session.open(1)
        await s.steps(states(2))
        s.network.kill(s.nodes[1].transport.peer_id)
        started_s = now_s()
        with pytest.raises(StreamLostError) as caught:
            await s.steps(states(1), first=2)
        assert caught.value.retryable
        assert now_s() - started_s <= s.network.detection_s + CONFIG.resume_s + RESUME_PAUSE_S


@virtual
async def test_a_cancelled_opening_leaves_nothing_at_the_nodes() -> None:
    async with scene(*HALVES) as s:
        s.network.freeze(s.nodes[1].transport.peer_id)
        opening = asyncio.create_task(s.session.open(1))
        await asyncio.sleep(1)
        assert len(s.nodes[0].node.sessions) == 1
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        await settle()
        assert len(s.nodes[0].node.sessions) == 0
        s.network.thaw(s.nodes[1].transport.peer_id)


@virtual
async def test_rows_that_cannot_be_opened_close_those_that_are_opened_later() -> None:
    async with scene(*HALVES) as s:
        for served in s.nodes:
            s.network.set_link(s.client.peer_id, served.transport.peer_id, LinkProfile(0.1))
        watcher = SwarmWatcher(s.client, KEY.name, KEY.num_blocks, 1.0)
        too_long = SwarmSession(s.client, watcher, CONFIG, KEY, 1, 10_000, PREFIX_KEY)
        with pytest.raises(CacheFullError):
            await _open_together([s.session, too_long], [1, 500], None)
        await asyncio.sleep(1)
        assert [len(served.node.sessions) for served in s.nodes] == [0, 0]


@virtual
async def test_a_directory_that_does_not_answer_has_a_deadline() -> None:
    async with scene(*HALVES) as s:
        s.network.freeze(s.client.peer_id)
        started_s = now_s()
        with pytest.raises(StepTimeoutError, match="directory"):
            await s.session.open(1)
        assert now_s() - started_s == pytest.approx(LOOKUP_S)
        s.network.thaw(s.client.peer_id)


@virtual
async def test_a_node_without_memory_is_passed_over() -> None:
    async with scene(*HALVES) as s:

        async def refuse(talk: Conversation, _: Any) -> None:
            await talk.send(error_reply(CacheFullError(20, 0)))

        await add_scripted_node(s.network, refuse)
        await s.session.open(1)
        assert [hop.peer_id for hop in s.session.route] == [served.transport.peer_id for served in s.nodes]


@virtual
async def test_a_node_without_memory_and_no_other_is_an_error() -> None:
    async with scene() as s:

        async def refuse(talk: Conversation, _: Any) -> None:
            await talk.send(error_reply(CacheFullError(20, 0)))

        await add_scripted_node(s.network, refuse)
        with pytest.raises(CacheFullError, match="20 tokens needed"):
            await s.session.open(1)


@virtual
async def test_missing_blocks_are_named() -> None:
    async with scene(Span(0, 2), Span(3, 4)) as s:
        with pytest.raises(MissingBlocksError, match=r"block 2, block 4 of"):
            await s.session.open(1)


@virtual
async def test_a_node_that_does_not_keep_to_the_protocol_is_passed_over() -> None:
    async with scene(*HALVES) as s:

        async def answer_nonsense(talk: Conversation, _: Any) -> None:
            await talk.send(StepReply(1, to_wire(states(1))))

        await add_scripted_node(s.network, answer_nonsense)
        await s.session.open(1)
        assert len(s.session.route) == 2


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(1, 2, HIDDEN), torch.zeros(1, 1, 5), torch.zeros(3), torch.zeros(1, 1, HIDDEN, dtype=torch.int64)],
    ids=["columns", "hidden", "dimensions", "dtype"],
)
@virtual
async def test_outputs_of_another_kind_are_the_nodes_error_at_once_and_again(wrong: torch.Tensor) -> None:
    async with scene() as s:

        async def answer(talk: Conversation, message: Any) -> None:
            match message:
                case OpenSession():
                    await talk.send(SessionOpened(1, b"t" * 16, 60.0))
                case ResumeSession():
                    await talk.send(SessionResumed(1, 1))
                    await talk.send(StepReply(1, to_wire(wrong)))
                case Step():
                    await talk.send(StepReply(message.step_id, to_wire(wrong)))

        await add_scripted_node(s.network, answer)
        await s.session.open(1)
        started_s = now_s()
        for _ in range(2):
            with pytest.raises(ProtocolError, match="answered"):
                await s.steps(states(1))
        assert now_s() - started_s < 1.0


@virtual
async def test_a_closed_session_says_so() -> None:
    async with scene(*HALVES) as s:
        await s.session.open(1)
        await s.session.close()
        await settle()
        assert [len(served.node.sessions) for served in s.nodes] == [0, 0]
        with pytest.raises(SessionClosedError):
            await s.steps(states(1))
