"""What the directory sees of a node from its start to its end, and how it leaves."""

import asyncio
import logging

import pytest

from server_node.announcer import Announcer
from server_node.draining import IDLE_S
from server_node.speed import RoutingFacts
from swarm_protocol.messages import CloseSession, Draining, ErrorReply, SessionClosed, SessionResumed, Step
from swarm_protocol.records import REFRESH_PERIOD_S
from swarm_protocol.spans import Span
from swarm_protocol.tensors import to_wire
from swarm_protocol.transport.memory_net import MemoryNetwork
from tests.node.node_scenario import (
    CACHE_TOKENS,
    SPAN,
    assert_error,
    assert_output,
    ended,
    forward,
    local_output,
    node_record,
    open_session,
    resume,
    serving_node,
    settle,
    states,
    virtual,
)
from tests.node.swarm_looks import records_of


@virtual
async def test_the_record_says_what_is_free():
    async with serving_node() as node:
        announcer = node.node._announcer
        refreshing = asyncio.create_task(announcer.run())
        assert (node.record().state, node.record().free_tokens, node.record().max_tokens) == ("online", 100, 100)
        await node.open()
        await asyncio.sleep(REFRESH_PERIOD_S + 1)
        assert node.record().free_tokens == CACHE_TOKENS - 20
        first = node.record()
        await asyncio.sleep(100)
        assert node.record().expires_at_s > first.expires_at_s + 60
        refreshing.cancel()


@virtual
async def test_a_draining_node_goes_on_with_open_sessions_and_begins_nothing():
    async with serving_node() as node:
        running, _ = await node.open()
        idle, _ = await node.open()
        going_on, _ = await node.open()
        greeting, computing = await node.dial(), await node.dial_compute()
        node.worker.gate.clear()
        await running.send(Step(1, 0, to_wire(states(2))))
        await settle()
        began_s = asyncio.get_running_loop().time()
        node.stop.set()
        for talk in (running, idle, going_on):
            assert await talk.receive() == Draining(60.0)
        assert node.record().state == "draining"
        assert_error(await greeting.ask(open_session()), "node_draining")
        assert_error(await computing.ask(forward(states(1))), "node_draining", step_id=1)
        node.worker.gate.set()
        assert_output(await running.receive(), local_output(states(2)))
        for position in range(20):  # a session in which something happens is not ended
            await asyncio.sleep(1.0)
            assert not isinstance(await going_on.step(position + 1, position, states(1)), ErrorReply)
        for talk in (running, idle):
            assert await ended(talk)
        assert await going_on.ask(CloseSession()) == SessionClosed()
        await node.serving
        assert asyncio.get_running_loop().time() - began_s < 21
        await node.assert_clean()


@virtual
async def test_a_session_that_goes_on_for_too_long_is_refused_its_steps():
    async with serving_node(drain_s=10.0) as node:
        talk, _ = await node.open()
        node.stop.set()
        assert await talk.receive() == Draining(10.0)
        await asyncio.sleep(4.0)
        assert not isinstance(await talk.step(1, 0, states(1)), ErrorReply)
        await asyncio.sleep(4.0)
        node.worker.gate.clear()
        await talk.send(Step(2, 1, to_wire(states(1))))
        await asyncio.sleep(3.0)
        node.worker.gate.set()
        assert (await talk.receive()).step_id == 2
        assert await ended(talk)
        await node.serving
        await node.assert_clean()


@virtual
async def test_who_resumes_at_a_draining_node_is_told_so():
    async with serving_node() as node:
        peer = node.network.transport()
        first, opened = await node.open(peer)
        await first.step(1, 0, states(2))
        node.network.break_streams(peer.peer_id, node.transport.peer_id)
        await settle()
        node.stop.set()
        await asyncio.sleep(2.0)
        talk = await node.dial(peer)
        assert isinstance(await talk.ask(resume(opened, 1)), SessionResumed)
        notice = await talk.receive()
        assert isinstance(notice, Draining)
        assert 57 < notice.leave_s <= 58


@virtual
async def test_a_step_that_does_not_end_is_given_up_after_a_while():
    async with serving_node(drain_s=30.0) as node:
        talk, _ = await node.open()
        node.worker.gate.clear()
        await talk.send(Step(1, 0, to_wire(states(2))))
        await settle()
        node.stop.set()
        await asyncio.sleep(29)
        assert not node.serving.done()
        await asyncio.sleep(10)
        assert node.serving.done()
        await node.assert_clean()


@virtual
async def test_a_peer_that_reads_nothing_does_not_keep_the_node_from_leaving():
    async with serving_node() as node:
        node.node.admission.free_token_blocks += 1 << 20
        talk, _ = await node.open(batch_size=256, max_tokens=20)
        for step_id in (1, 2):
            await talk.send(Step(step_id, 0, to_wire(states(16, rows=256))))
            await settle()
        node.stop.set()
        await asyncio.sleep(IDLE_S + 6)
        assert node.serving.done()
        node.node.admission.free_token_blocks -= 1 << 20
        await node.assert_clean()


@virtual
async def test_an_idle_node_leaves_at_once():
    async with serving_node() as node:
        talk, _ = await node.open()
        await talk.ask(CloseSession())
        node.stop.set()
        await settle()
        assert node.serving.done()


def test_the_announcer_outlives_a_failing_directory(caplog: pytest.LogCaptureFixture):
    @virtual
    async def scenario() -> None:
        network = MemoryNetwork()
        transport = network.transport()
        directory = transport.directory
        announcer = Announcer(transport, network.identity(transport.peer_id).sign, node_record(transport))
        stored: list[float] = []
        store = directory.store

        async def failing(key: str, subkey: str, value: bytes, expires_at_s: float) -> bool:
            stored.append(asyncio.get_running_loop().time())
            if len(stored) == 1:
                raise OSError("no network")
            if len(stored) == 2:
                await asyncio.sleep(1000)
            return len(stored) > 3 and await store(key, subkey, value, expires_at_s)

        directory.store = failing  # type: ignore[method-assign]
        assert not await announcer.announce("online")
        task = asyncio.create_task(announcer.run())
        await asyncio.sleep(60)
        task.cancel()
        assert network.records
        # At once, then 1 s after the failure, 2 s after the second one's deadline of 8 s, 4 s, and as usual again.
        assert stored[:5] == [0, 1, 11, 15, 25]

    scenario()
    assert [record.levelno for record in caplog.records if "did not take" in record.message] == [logging.WARNING] * 3


@virtual
async def test_hours_without_a_directory_do_not_end_the_announcing():
    network = MemoryNetwork()
    transport = network.transport()
    announcer = Announcer(transport, network.identity(transport.peer_id).sign, node_record(transport))
    store = transport.directory.store
    is_there = False

    async def failing(key: str, subkey: str, value: bytes, expires_at_s: float) -> bool:
        return is_there and await store(key, subkey, value, expires_at_s)

    transport.directory.store = failing  # type: ignore[method-assign]
    await announcer.announce("online")
    task = asyncio.create_task(announcer.run())
    await asyncio.sleep(6 * 3600)
    is_there = True
    await asyncio.sleep(2 * REFRESH_PERIOD_S)
    assert network.records
    task.cancel()


@virtual
async def test_a_withdrawal_replaces_the_record_and_outlives_it():
    network = MemoryNetwork()
    transport = network.transport()
    announcer = Announcer(transport, network.identity(transport.peer_id).sign, node_record(transport))
    for state in ("joining", "online", "draining", "offline"):
        assert await announcer.announce(state)
    ((_, expires_at_s),) = (next(iter(values.values())) for values in network.records.values())
    assert expires_at_s > transport.now_s() + 30
    assert announcer.state == "offline"


@virtual
async def test_a_node_that_others_cannot_reach_any_more_says_that_it_is_not_online():
    async with serving_node() as node:
        is_reachable = True
        node.node.is_reachable = lambda: is_reachable
        await asyncio.sleep(2 * REFRESH_PERIOD_S)
        assert node.record().state == "online"
        is_reachable = False
        await asyncio.sleep(2 * REFRESH_PERIOD_S)
        assert node.record().state == "joining"
        await node.open()  # who has a connection goes on
        is_reachable = True
        await asyncio.sleep(2 * REFRESH_PERIOD_S)
        assert node.record().state == "online"
        is_reachable = False
        node.stop.set()
        await asyncio.sleep(1)
        assert node.record().state == "draining"


@virtual
async def test_a_node_that_moves_is_found_at_its_new_blocks_alone():
    network = MemoryNetwork()
    transport = network.transport()
    announcer = Announcer(transport, network.identity(transport.peer_id).sign, node_record(transport))
    announcer.serving(100, lambda: 50, lambda: RoutingFacts(block_step_s=0.1))
    await announcer.announce("online")
    await announcer.announce("draining", Span(20, 22))
    (record,) = records_of(network, 30)
    assert (record.state, record.planned_span) == ("draining", Span(20, 22))
    await announcer.move_to(Span(20, 22))
    old, new = sorted(records_of(network, 30), key=lambda record: record.incarnation)
    assert (old.span, old.state, old.next_blocks) == (SPAN, "offline", None)
    assert (new.span, new.state, new.next_blocks) == (Span(20, 22), "joining", None)
    assert (new.max_tokens, new.free_tokens, new.block_step_s) == (0, 0, None), "nothing of the old blocks is said"
    assert announcer.published == new
    await announcer.move_to(Span(21, 23))
    assert len(records_of(network, 30)) == 2, "in the same place it replaces the former record"
    await announcer.announce("offline")
    refreshing = asyncio.create_task(announcer.run())
    await asyncio.sleep(120)
    assert records_of(network, 30) == [], "what is withdrawn is not refreshed"
    refreshing.cancel()
