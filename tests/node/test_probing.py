"""A node says that it is online once a step from outside went through it."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from server_node.admission import ServedSpan
from server_node.announcer import Announcer
from server_node.node import Node
from server_node.probing import Prober, Proof
from swarm_protocol.message_stream import MessageStream
from swarm_protocol.messages import (
    PROBE_PROTOCOL,
    SESSION_PROTOCOL,
    CloseSession,
    ErrorReply,
    OpenSession,
    Ping,
    Probed,
    ProbeMe,
    SessionClosed,
    SessionOpened,
    Step,
    StepReply,
    WireTensor,
)
from swarm_protocol.transport.base import FrameStream
from swarm_protocol.transport.memory_net import MemoryNetwork, MemoryTransport
from tests.node.node_scenario import (
    CACHE_TOKENS,
    HIDDEN,
    MODEL,
    REVISION,
    SPAN,
    WHOLE_CACHE,
    GatedWorker,
    node_record,
    serving_node,
    settle,
    virtual,
)

ASKED = ProbeMe(MODEL, REVISION, SPAN.start, SPAN.end, HIDDEN)
NUM_BLOCKS = SPAN.end


class Joining:
    """A node that is about to be online."""

    def __init__(self, network: MemoryNetwork, initial_peers: tuple[MemoryTransport, ...] = ()) -> None:
        self.network, self.transport = network, network.transport()
        self.num_outside_peers = 0
        self.stop, self.online = asyncio.Event(), asyncio.Event()
        self.announcer = Announcer(
            self.transport, network.identity(self.transport.peer_id).sign, node_record(self.transport)
        )
        served = ServedSpan(MODEL, REVISION, SPAN, HIDDEN, "float32", CACHE_TOKENS, "test")
        self.worker = GatedWorker()
        self.node = Node(self.transport, self.announcer, self.worker, served, WHOLE_CACHE)
        self.proof = Proof(
            self.transport, served, NUM_BLOCKS, [peer.peer_id for peer in initial_peers], self._outside_peer
        )

    @asynccontextmanager
    async def _outside_peer(self) -> AsyncIterator[MemoryTransport]:
        self.num_outside_peers += 1
        outside = self.network.transport()
        yield outside
        await outside.close()

    async def __aenter__(self) -> "Joining":
        await self.announcer.announce("joining")
        self.serving = asyncio.create_task(
            self.node.serve(self.stop, self.online.set, prove=self.proof.given), name="node"
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop.set()
        await self.serving
        await self.transport.close()


def test_the_first_node_is_tried_out_by_a_second_peer_of_its_own():
    @virtual
    async def scenario() -> None:
        async with Joining(MemoryNetwork()) as node:
            await node.online.wait()
            assert node.num_outside_peers == 1
            assert node.announcer.state == "online"
            assert (node.node.admission.free_tokens, len(node.node.sessions)) == (CACHE_TOKENS, 0)

    scenario()


def test_nodes_that_are_there_are_asked():
    @virtual
    async def scenario() -> None:
        network = MemoryNetwork()
        async with serving_node(network=network) as first, Joining(network) as node:
            await node.online.wait()
            assert node.num_outside_peers == 0
            assert first.node.admission.num_sessions == 0

    scenario()


def test_a_first_peer_that_serves_nothing_is_asked():
    @virtual
    async def scenario() -> None:
        network = MemoryNetwork()
        first = network.transport()
        await first.serve(PROBE_PROTOCOL, Prober(first).serve)
        async with Joining(network, (first,)) as node:
            await node.online.wait()
            assert node.num_outside_peers == 0

    scenario()


def test_a_node_that_nobody_reaches_says_so_and_is_online_once_it_can_be(caplog: pytest.LogCaptureFixture):
    @virtual
    async def scenario() -> None:
        network = MemoryNetwork()
        first = network.transport()

        async def cannot_dial(stream: FrameStream) -> None:
            messages = MessageStream(stream)
            assert await messages.receive() == ASKED
            await messages.send(Probed("peer_unreachable", "a firewall is in the way"))

        await first.serve(PROBE_PROTOCOL, cannot_dial)
        async with Joining(network, (first,)) as node:
            await asyncio.sleep(60)
            assert not node.online.is_set()
            assert (node.announcer.state, node.num_outside_peers) == ("joining", 0)
            assert "a firewall is in the way" in caplog.text
            assert "not reachable directly, and through no relay" in caplog.text
            await first.serve(PROBE_PROTOCOL, Prober(first).serve)
            await node.online.wait()

    with caplog.at_level(logging.WARNING):
        scenario()


def test_a_node_that_is_asked_to_leave_before_it_was_tried_out_leaves():
    @virtual
    async def scenario() -> None:
        network = MemoryNetwork()
        first = network.transport()

        async def silent(stream: FrameStream) -> None:
            await asyncio.sleep(1000)

        await first.serve(PROBE_PROTOCOL, silent)
        async with Joining(network, (first,)) as node:
            await asyncio.sleep(1)
        assert not node.online.is_set()

    scenario()


def test_peers_that_do_not_answer_count_as_not_there():
    @virtual
    async def scenario() -> None:
        network = MemoryNetwork()
        dead, lying = network.transport(), network.transport()
        await dead.close()

        async def lie(stream: FrameStream) -> None:
            await MessageStream(stream).send(Ping(1))

        await lying.serve(PROBE_PROTOCOL, lie)
        async with Joining(network, (dead, lying)) as node:
            await node.online.wait()
            assert node.num_outside_peers == 1

    scenario()


async def ask(prober: MemoryTransport, node: MemoryTransport, asked: object = ASKED) -> Probed | ErrorReply:
    messages = MessageStream(await node.dial(prober.peer_id, PROBE_PROTOCOL))
    await messages.send(asked)  # type: ignore[arg-type]
    reply = await messages.receive()
    await messages.close()
    assert isinstance(reply, Probed | ErrorReply)
    return reply


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (WireTensor("float32", (1, 1, HIDDEN), bytes(4 * HIDDEN)), ""),
        (WireTensor("float32", (1, 1, HIDDEN), b"\x00\x00\xc0\x7f" * HIDDEN), "invalid_tensor"),
        (WireTensor("float32", (1, 1, 8), bytes(32)), "invalid_tensor"),
        (WireTensor("float32", (1, 0, HIDDEN), b""), "unexpected_message"),
        (WireTensor("int64", (1, 1, HIDDEN), bytes(8 * HIDDEN)), "invalid_tensor"),
    ],
)
def test_what_comes_out_of_the_blocks_is_looked_at(states: WireTensor, code: str):
    @virtual
    async def scenario() -> None:
        network = MemoryNetwork()
        node, prober = network.transport(), network.transport()
        await prober.serve(PROBE_PROTOCOL, Prober(prober).serve)

        async def answer(stream: FrameStream) -> None:
            messages = MessageStream(stream)
            opening = await messages.receive()
            assert isinstance(opening, OpenSession)
            assert (opening.start_block, opening.end_block, opening.max_tokens) == (SPAN.start, SPAN.end, 1)
            await messages.send(SessionOpened(1, b"t" * 16, 60.0))
            step = await messages.receive()
            assert isinstance(step, Step)
            await messages.send(StepReply(step.step_id, states))
            assert await messages.receive() == CloseSession()
            await messages.send(SessionClosed())

        await node.serve(SESSION_PROTOCOL, answer)
        found = await ask(prober, node)
        assert isinstance(found, Probed)
        assert found.code == code

    scenario()


def test_a_peer_is_tried_out_now_and_then_and_few_at_a_time():
    @virtual
    async def scenario() -> None:
        network = MemoryNetwork()
        prober = network.transport()
        await prober.serve(PROBE_PROTOCOL, Prober(prober).serve)
        node = network.transport()
        assert await ask(prober, node) == Probed(
            "peer_unreachable", f"cannot reach {node.peer_id}: it does not serve {SESSION_PROTOCOL}"
        )
        assert (await ask(prober, node)).code == "limit_exceeded"
        await asyncio.sleep(3)
        assert (await ask(prober, node)).code == "peer_unreachable"

        async def hang(stream: FrameStream) -> None:
            await asyncio.sleep(1000)

        others = [network.transport() for _ in range(5)]
        for other in others:
            await other.serve(SESSION_PROTOCOL, hang)
        await asyncio.sleep(3)
        found = await asyncio.gather(*(ask(prober, other) for other in others))
        assert sorted(reply.code for reply in found) == ["limit_exceeded", *["timeout"] * 4]

    scenario()


def test_what_is_no_request_is_refused():
    @virtual
    async def scenario() -> None:
        network = MemoryNetwork()
        prober, stranger = network.transport(), network.transport()
        await prober.serve(PROBE_PROTOCOL, Prober(prober).serve)
        found = await ask(prober, stranger, Ping(1))
        assert found.code == "unexpected_message"
        await ask(prober, stranger, replace(ASKED, model="another"))
        silent = await stranger.dial(prober.peer_id, PROBE_PROTOCOL)
        await asyncio.sleep(30)
        await silent.close()
        await settle()

    scenario()
