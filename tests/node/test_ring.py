"""Steps come from the node before and go on to the next one; what went on is sent again when it is asked for."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from server_node.downstream import Downstream
from swarm_protocol.ids import PeerId
from swarm_protocol.messages import (
    PAGE_TOKENS,
    RING_PROTOCOL,
    CloseSession,
    ErrorReply,
    JoinSession,
    Onward,
    Ping,
    Pong,
    RingJoined,
    SendTape,
    SessionClosed,
    Step,
    StepReply,
    TapeSent,
)
from swarm_protocol.tensors import from_wire, to_wire
from swarm_protocol.transport.base import FrameStream
from swarm_protocol.transport.memory_net import MemoryTransport
from tests.node.node_scenario import (
    Conversation,
    Scenario,
    assert_error,
    assert_output,
    ended,
    local_output,
    serving_node,
    settle,
    states,
    virtual,
)

SESSION, NEXT_SESSION = b"s" * 16, b"n" * 16


@dataclass
class NextNode:
    """A peer that takes the steps of the ring."""

    transport: MemoryTransport
    joins: list[JoinSession] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    talks: list[Conversation] = field(default_factory=list)

    def onward(self, step_id: int, **fields: Any) -> Onward:
        return Onward(self.transport.peer_id, NEXT_SESSION, step_id, **fields)

    async def serve(self, stream: FrameStream) -> None:
        talk = Conversation(stream)
        self.talks.append(talk)
        self.joins.append(await talk.receive())
        await talk.send(RingJoined())
        while True:
            self.steps.append(await talk.receive())


@dataclass
class Ring:
    """A node between two others, and the client whose session it is."""

    node: Scenario
    client: MemoryTransport
    before: MemoryTransport
    behind: NextNode

    async def open(self, **fields: Any) -> Conversation:
        wanted = {"upstream": self.before.peer_id, "downstream": self.behind.transport.peer_id, "max_tokens": 30}
        talk, _ = await self.node.open(self.client, **(wanted | fields))
        return talk

    async def join(self, peer: MemoryTransport | None = None, session_id: bytes = SESSION) -> tuple[Conversation, Any]:
        talk = await self.node.dial(peer or self.before, RING_PROTOCOL)
        return talk, await talk.ask(JoinSession(self.client.peer_id, session_id))


@asynccontextmanager
async def ring(**limits: Any) -> AsyncIterator[Ring]:
    async with serving_node(**limits) as node:
        behind = NextNode(node.network.transport())
        await behind.transport.serve(RING_PROTOCOL, behind.serve)
        yield Ring(node, node.network.transport(), node.network.transport(), behind)


async def leave(talk: Conversation, r: Ring) -> None:
    """Close the session; nothing may be left of it."""
    assert await talk.ask(CloseSession()) == SessionClosed()
    await settle()
    await r.node.assert_clean()
    assert r.node.node.sessions.tapes.used_bytes == 0
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "downstream"]


@virtual
async def test_an_output_goes_on_to_the_next_node_and_the_client_hears_of_it() -> None:
    async with ring() as r:
        talk = await r.open()
        far = Onward("12D3KooWfar", b"f" * 16, 9)
        reply = await talk.step(1, 0, states(3), onward=(r.behind.onward(5, max_tokens=40), far), wants_output=False)
        assert reply.hidden_states.shape == (1, 0, 32)
        assert reply.compute_s > 0
        await settle()
        (passed,) = r.behind.steps
        assert (passed.step_id, passed.position, passed.max_tokens) == (5, 0, 40)
        assert (passed.onward, passed.wants_output, passed.upstream) == ((far,), False, None)
        assert_output(passed, local_output(states(3)))
        assert r.behind.joins == [JoinSession(r.client.peer_id, NEXT_SESSION)]
        await talk.step(2, 3, states(1), onward=(r.behind.onward(6),))
        await settle()
        assert [step.step_id for step in r.behind.steps] == [5, 6]
        assert len(r.behind.joins) == 1  # on one stream
        await leave(talk, r)
        assert await ended(r.behind.talks[0])


@virtual
async def test_a_step_from_the_node_before_is_answered_to_the_client() -> None:
    async with ring() as r:
        talk = await r.open(downstream=None)
        before, joined = await r.join()
        assert joined == RingJoined()
        await before.send(Step(1, 0, to_wire(states(3))))
        assert_output(await talk.receive(), local_output(states(3)))
        await before.send(Step(2, 3, to_wire(states(4)[:, 3:])))
        assert_output(await talk.receive(), local_output(states(4))[:, 3:])
        assert await talk.ask(Ping(7)) == Pong(7, last_step_id=2)
        await leave(talk, r)
        assert await ended(before)


@virtual
async def test_what_the_client_brings_itself_is_not_taken_from_the_node_before_again() -> None:
    async with ring() as r:
        talk = await r.open(downstream=None)
        before, _ = await r.join()
        first = await talk.step(1, 0, states(3))
        await before.send(Step(1, 0, to_wire(states(3))))  # late
        await before.send(Step(2, 3, to_wire(states(4)[:, 3:])))
        reply = await talk.receive()
        assert reply.step_id == 2
        assert_output(reply, local_output(states(4))[:, 3:])
        assert await talk.step(1, 0, states(3)) == first
        await leave(talk, r)


@virtual
async def test_a_step_that_comes_too_early_is_left_to_the_client_without_a_word() -> None:
    async with ring() as r:
        talk = await r.open(downstream=None)
        before, _ = await r.join()
        await before.send(Step(2, 3, to_wire(states(4)[:, 3:])))  # the one before got lost on the way
        assert await talk.ask(Ping(7)) == Pong(7, last_step_id=0)
        assert_output(await talk.step(1, 0, states(3)), local_output(states(3)))
        assert_output(await talk.step(2, 3, states(4)[:, 3:]), local_output(states(4))[:, 3:])
        await leave(talk, r)


@virtual
async def test_an_output_that_has_gone_on_comes_back_when_the_client_asks_for_it() -> None:
    async with ring() as r:
        talk = await r.open()
        await talk.step(1, 0, states(3), onward=(r.behind.onward(1),))
        assert_output(await talk.step(1, 0, states(0)), local_output(states(3)))
        assert_output(await talk.step(2, 3, states(4)[:, 3:]), local_output(states(4))[:, 3:])
        await leave(talk, r)


@virtual
async def test_a_running_step_that_the_client_sends_again_comes_back_to_it() -> None:
    async with ring() as r:
        talk = await r.open()
        before, _ = await r.join()
        r.node.worker.gate.clear()
        await before.send(Step(1, 0, to_wire(states(3)), onward=(r.behind.onward(1),)))
        await settle()
        await talk.send(Step(1, 0, to_wire(states(3))))
        await settle()
        r.node.worker.gate.set()
        assert_output(await talk.receive(), local_output(states(3)))
        assert not r.behind.steps
        await leave(talk, r)


@pytest.mark.parametrize("trouble", ["gone", "refuses", "silent", "nonsense"])
@virtual
async def test_the_client_gets_what_the_next_node_does_not_take(trouble: str) -> None:
    async with ring() as r:
        other = r.node.network.transport()

        async def serve(stream: FrameStream) -> None:
            talk = Conversation(stream)
            await talk.receive()
            if trouble == "silent":
                await talk.receive()
            await talk.send(ErrorReply("session_not_found", "no", True) if trouble == "refuses" else Pong(1))

        if trouble != "gone":
            await other.serve(RING_PROTOCOL, serve)
        talk = await r.open()
        reply = await talk.step(1, 0, states(3), onward=(Onward(other.peer_id, NEXT_SESSION, 1),))
        assert_output(reply, local_output(states(3)))
        await talk.step(2, 3, states(1), onward=(r.behind.onward(1),))
        await settle()
        assert len(r.behind.steps) == 1
        await leave(talk, r)


@virtual
async def test_a_next_node_that_takes_no_more_bytes_delays_its_step_only_for_so_long() -> None:
    async with ring() as r:
        talk = await r.open(batch_size=2)
        await talk.step(1, 0, states(1, rows=2), onward=(r.behind.onward(1),))
        r.node.network.freeze(r.behind.transport.peer_id)
        started_s = asyncio.get_running_loop().time()
        position, reply = 1, None
        for number in range(2, 200):  # until the buffers are full
            reply = await talk.step(number, position % 20, states(8, rows=2), onward=(r.behind.onward(number),))
            position = position % 20 + 8 if position % 20 + 8 <= 20 else 0
            if reply.hidden_states.shape[1]:
                break
        assert isinstance(reply, StepReply)
        assert asyncio.get_running_loop().time() - started_s < 3.0
        r.node.network.thaw(r.behind.transport.peer_id)
        await leave(talk, r)


@virtual
async def test_only_the_named_node_joins_and_only_a_session_that_is_there() -> None:
    async with ring() as r:
        talk = await r.open()
        stranger = r.node.network.transport()
        assert_error((await r.join(stranger))[1], "session_not_found")
        assert_error((await r.join(session_id=b"x" * 16))[1], "session_not_found")
        first = await r.node.dial(r.before, RING_PROTOCOL)
        assert_error(await first.ask(Step(1, 0, to_wire(states(1)))), "unexpected_message")
        before, joined = await r.join()
        assert joined == RingJoined()
        assert_error(await before.ask(CloseSession()), "unexpected_message")  # it is not its session
        assert_output(await talk.step(1, 0, states(2)), local_output(states(2)))
        await leave(talk, r)


@virtual
async def test_the_client_may_name_another_node_before() -> None:
    async with ring() as r:
        talk = await r.open(downstream=None)
        old, _ = await r.join()
        new = r.node.network.transport()
        assert_error((await r.join(new))[1], "session_not_found")
        await talk.step(1, 0, states(2), upstream=new.peer_id)
        assert await ended(old)
        assert_error((await r.join())[1], "session_not_found")
        before, joined = await r.join(new)
        assert joined == RingJoined()
        await before.send(Step(2, 2, to_wire(states(3)[:, 2:])))
        assert_output(await talk.receive(), local_output(states(3))[:, 2:])
        await leave(talk, r)


@virtual
async def test_a_tape_is_sent_on_and_back_as_it_is_by_now() -> None:
    async with ring() as r:
        talk = await r.open(batch_size=2)
        await talk.step(1, 0, states(6, rows=2), onward=(r.behind.onward(1),))
        await talk.step(2, 4, states(8, rows=2)[:, 6:], row_order=(1, 1), onward=(r.behind.onward(2),))
        wanted = local_output(torch.cat([states(6, rows=2)[[1, 1], :4], states(8, rows=2)[:, 6:]], dim=1))
        back = await talk.ask(SendTape(77, 1, 6))
        assert back.request_id == 77
        assert_output(back, wanted[:, 1:6])
        gone = await talk.ask(SendTape(78, 2, 5, (r.behind.onward(3, max_tokens=50),)))
        assert gone == TapeSent(78, to_wire(states(0, rows=2)))
        await settle()
        passed = r.behind.steps[-1]
        assert (passed.step_id, passed.position, passed.max_tokens, passed.wants_output) == (3, 2, 50, False)
        torch.testing.assert_close(from_wire(passed.hidden_states), wanted[:, 2:5], rtol=1e-5, atol=1e-5)
        await leave(talk, r)


@virtual
async def test_a_tape_that_is_not_there_is_said_to_be_lost() -> None:
    async with ring(max_step_tokens=8) as r:
        talk = await r.open()
        await talk.step(1, 0, states(4), onward=(r.behind.onward(1),))
        assert_error(await talk.ask(SendTape(5, 0, 5)), "tape_lost", step_id=5)
        assert_error(await talk.ask(SendTape(6, 3, 3)), "invalid_request", step_id=6)
        assert_error(await talk.ask(SendTape(7, 0, 9)), "invalid_request", step_id=7)
        assert_output(await talk.ask(SendTape(8, 0, 4)), local_output(states(4)))
        await leave(talk, r)
        last = await r.open(downstream=None)
        await last.step(1, 0, states(4))
        assert_error(await last.ask(SendTape(9, 0, 4)), "tape_lost", step_id=9)
        await leave(last, r)


@virtual
async def test_tapes_have_room_for_so_much_and_a_peer_for_half_of_it() -> None:
    async with ring(tape_bytes=20 * 4 * 32) as r:
        talk = await r.open()
        await talk.step(1, 0, states(10), onward=(r.behind.onward(1),))
        assert_output(await talk.ask(SendTape(5, 0, 10)), local_output(states(10)))
        await talk.step(2, 10, states(1), onward=(r.behind.onward(2),))
        assert_error(await talk.ask(SendTape(6, 0, 10)), "tape_lost", step_id=6)
        await leave(talk, r)


@virtual
async def test_prefixes_are_cached_only_as_far_as_their_tape_is_there() -> None:
    hashes, tokens = (b"1" * 16, b"2" * 16), 2 * PAGE_TOKENS
    async with ring(max_sessions_per_peer=4) as r:
        r.node.worker.keep_prefixes(1 << 24)
        fields: dict[str, Any] = {"prefix": hashes, "max_tokens": tokens // 2 + 20}
        short = await r.open(**fields)
        wanted = local_output(states(PAGE_TOKENS))
        await short.step(1, 0, states(PAGE_TOKENS), onward=(r.behind.onward(1),))
        assert await short.ask(CloseSession()) == SessionClosed()
        talk, opened = await r.node.open(r.client, downstream=r.behind.transport.peer_id, **fields)
        assert opened.cached_tokens == PAGE_TOKENS
        assert_output(await talk.ask(SendTape(5, 0, PAGE_TOKENS)), wanted)
        assert await talk.ask(CloseSession()) == SessionClosed()
        r.node.node.sessions.tapes.prefixes.find(())  # the pages of keys and values outlive those of the tape
        r.node.node.sessions.tapes.prefixes.max_bytes = 0
        r.node.node.sessions.tapes.prefixes.keep(b"another", to_wire(states(1)))
        talk, opened = await r.node.open(r.client, downstream=r.behind.transport.peer_id, **fields)
        assert opened.cached_tokens == 0
        assert_output(await talk.step(1, 0, states(3)), local_output(states(3)))
        assert await talk.ask(CloseSession()) == SessionClosed()
        plain, opened = await r.node.open(r.client, **fields)
        assert opened.cached_tokens == PAGE_TOKENS  # the last node of a route has no tape to begin
        await leave(plain, r)


@virtual
async def test_what_another_node_brings_counts_for_the_client() -> None:
    async with ring() as r:
        talk = await r.open(downstream=None)
        before, _ = await r.join()
        await settle()
        streams = r.node.node.admission._streams
        assert (streams[r.client.peer_id], streams[r.before.peer_id]) == (2, 0)
        await before.send(Step(1, 0, to_wire(states(1))))
        await talk.receive()
        assert set(r.node.node.admission.rates._buckets) >= {r.client.peer_id}
        await leave(talk, r)


def test_a_session_sends_on_to_a_few_nodes_only() -> None:
    @virtual
    async def scenario() -> None:
        async with ring() as r:
            downstream = Downstream(r.node.transport, PeerId(r.client.peer_id), r.node.node.admission.limits)
            for number in range(10):
                to = Onward(r.behind.transport.peer_id, bytes([number]) * 16, 1)
                assert await downstream.push(Step(1, 0, to_wire(states(1))), to)
            await settle()
            live = [task for task in asyncio.all_tasks() if task.get_name() == "downstream"]
            assert len(live) == 4
            downstream.close()
            await settle()
            assert not [task for task in asyncio.all_tasks() if task.get_name() == "downstream"]

    scenario()
