"""A node on the network in memory, with a tiny random model and a fake clock, and peers that talk to it."""

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Executor, Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from server_node.admission import ServedSpan
from server_node.announcer import Announcer
from server_node.compute.block_runner import BlockRunner
from server_node.compute.work import Work
from server_node.compute.worker import ComputeWorker
from server_node.config import NodeLimits
from server_node.node import Node
from server_node.paced_transport import paced
from swarm_protocol.errors import StreamLostError
from swarm_protocol.identity import verify
from swarm_protocol.messages import (
    COMPUTE_PROTOCOL,
    PROTOCOL_VERSIONS,
    SESSION_PROTOCOL,
    ErrorReply,
    Forward,
    Message,
    OpenSession,
    ResumeSession,
    SessionOpened,
    Step,
)
from swarm_protocol.model.checkpoint import open_checkpoint
from swarm_protocol.model.parts import SpanModule, load_span
from swarm_protocol.records import NodeRecord, directory_key, unseal
from swarm_protocol.spans import Span
from swarm_protocol.tensors import from_wire, to_wire
from swarm_protocol.transport.base import FrameStream
from swarm_protocol.transport.memory_net import MemoryNetwork, MemoryTransport
from swarm_protocol.transport.virtual_clock import run_virtual
from swarm_protocol.wire import MessageAssembler, encode
from tests.tiny_models import save_tiny_model

SPAN = Span(1, 4)
CACHE_TOKENS = 100
WHOLE_CACHE = NodeLimits(max_cache_share_per_peer=1.0, headroom_share=0.0)
"""One peer may fill the cache to its last token, so that tests can count."""
HIDDEN = 32
MODEL, REVISION = "tiny-llama", "0123456789abcdef"


@cache
def tiny_span() -> SpanModule:
    with TemporaryDirectory() as folder:
        save_tiny_model("llama", Path(folder))
        return load_span(open_checkpoint(folder), SPAN, dtype=torch.float32, device=torch.device("cpu"))


def virtual(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test on a loop whose time is virtual."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        run_virtual(test(*args, **kwargs))

    return run


class InlineExecutor(Executor):
    """Does what is submitted at once, in the caller's thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class GatedWorker(ComputeWorker):
    """Does nothing while its gate is closed, and raises `bug` instead of computing if there is one."""

    def __init__(self, executor: Executor | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(executor or InlineExecutor(), runner=BlockRunner(tiny_span()), clock=clock)
        self.gate = asyncio.Event()
        self.gate.set()
        self.bug: Exception | None = None

    async def run(self, work: Work) -> Any:  # type: ignore[override]
        await self.gate.wait()
        if self.bug is not None:
            raise self.bug
        return await super().run(work)


class Conversation:
    """A peer's end of one stream."""

    def __init__(self, stream: FrameStream) -> None:
        self.stream = stream
        self._assembler = MessageAssembler()

    async def send(self, message: Message) -> None:
        for parts in encode(message):
            await self.stream.send(parts)

    async def receive(self) -> Any:
        async with asyncio.timeout(5000):
            while True:
                message = self._assembler.feed(await self.stream.receive())
                if message is not None:
                    return message

    async def ask(self, message: Message) -> Any:
        await self.send(message)
        return await self.receive()

    async def step(self, step_id: int, position: int, hidden_states: torch.Tensor, **fields: Any) -> Any:
        return await self.ask(Step(step_id, position, to_wire(hidden_states), **fields))


@dataclass
class Scenario:
    """A node that serves, and the means to act on it and to look into it."""

    network: MemoryNetwork
    transport: MemoryTransport
    node: Node
    worker: GatedWorker
    stop: asyncio.Event
    serving: "asyncio.Task[None]"

    async def dial(self, peer: MemoryTransport | None = None, protocol: str = SESSION_PROTOCOL) -> Conversation:
        peer = peer or self.network.transport()
        return Conversation(await peer.dial(self.transport.peer_id, protocol))

    async def dial_compute(self) -> Conversation:
        return await self.dial(protocol=COMPUTE_PROTOCOL)

    async def open(self, peer: MemoryTransport | None = None, **fields: Any) -> tuple[Conversation, SessionOpened]:
        talk = await self.dial(peer)
        opened = await talk.ask(open_session(**fields))
        assert isinstance(opened, SessionOpened), opened
        return talk, opened

    @property
    def free_tokens(self) -> int:
        return self.node.admission.free_tokens

    async def assert_clean(self) -> None:
        """Nothing is left of any peer but what was there at the start."""
        await settle()
        admission = self.node.admission
        assert len(self.node.sessions) == 0
        assert admission.free_token_blocks == CACHE_TOKENS * len(SPAN)
        assert (admission.num_sessions, admission.num_streams, admission.num_queued) == (0, 0, 0)
        names = sorted(task.get_name() for task in asyncio.all_tasks())
        assert not [name for name in names if "handler" in name or name in ("step", "link-writer")]

    def record(self) -> NodeRecord:
        """The node's record as anybody finds it."""
        value, _ = self.network.records[directory_key(MODEL, SPAN.start)][self.transport.peer_id]
        return unseal(value, self.transport.peer_id, verify, self.network.now_s())


@asynccontextmanager
async def serving_node(
    worker: GatedWorker | None = None,
    network: MemoryNetwork | None = None,
    numerics: str = "test",
    max_bytes_per_s: int | None = None,
    **limits: Any,
) -> AsyncIterator[Scenario]:
    network = network or MemoryNetwork()
    transport = network.transport()
    worker = worker or GatedWorker()
    announcer = Announcer(transport, network.identity(transport.peer_id).sign, node_record(transport))
    served = ServedSpan(MODEL, REVISION, SPAN, HIDDEN, "float32", CACHE_TOKENS, numerics)
    on_network = paced(transport, max_bytes_per_s)
    node = Node(on_network, announcer, worker, served, replace(WHOLE_CACHE, **limits))
    stop, online = asyncio.Event(), asyncio.Event()
    serving = asyncio.create_task(node.serve(stop, online.set), name="node")
    await online.wait()
    yield Scenario(network, transport, node, worker, stop, serving)
    worker.gate.set()
    stop.set()
    await serving
    await transport.close()


def node_record(transport: MemoryTransport) -> NodeRecord:
    return NodeRecord(
        transport.peer_id, MODEL, REVISION, SPAN.start, SPAN.end, "joining", 1, 0.0, 0.0, PROTOCOL_VERSIONS,
        "umbel test", "float32", "test", 0, 0,
    )  # fmt: skip


def open_session(**fields: Any) -> OpenSession:
    defaults = {
        "session_id": b"s" * 16,
        "versions": PROTOCOL_VERSIONS,
        "model": MODEL,
        "revision": REVISION,
        "start_block": SPAN.start,
        "end_block": SPAN.end,
        "batch_size": 1,
        "max_tokens": 20,
    }
    return OpenSession(**{**defaults, **fields})


def forward(hidden_states: torch.Tensor, **fields: Any) -> Forward:
    defaults = {
        "request_id": 1,
        "model": MODEL,
        "revision": REVISION,
        "start_block": SPAN.start,
        "end_block": SPAN.end,
        "hidden_states": to_wire(hidden_states),
    }
    return Forward(**{**defaults, **fields})


def resume(opened: SessionOpened, last_step_id: int, session_id: bytes = b"s" * 16) -> ResumeSession:
    return ResumeSession(session_id, opened.resume_token, last_step_id)


def states(num_tokens: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def local_output(hidden_states: torch.Tensor, blocks: Span = SPAN) -> torch.Tensor:
    with torch.inference_mode():
        return tiny_span()(hidden_states, blocks=blocks)


def assert_output(reply: Any, expected: torch.Tensor) -> None:
    assert not isinstance(reply, ErrorReply), reply
    torch.testing.assert_close(from_wire(reply.hidden_states), expected, rtol=1e-5, atol=1e-5)


def assert_error(reply: Any, code: str, step_id: int | None = None) -> None:
    assert isinstance(reply, ErrorReply), reply
    assert (reply.code, reply.step_id) == (code, step_id), reply
    assert "Traceback" not in reply.message


async def settle() -> None:
    """Let everything happen that needs no time."""
    await asyncio.sleep(0.001)


async def ended(talk: Conversation) -> bool:
    """Whether the node ends the stream without sending anything more."""
    try:
        await talk.receive()
    except StreamLostError:
        return True
    return False
