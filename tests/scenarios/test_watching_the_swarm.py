"""A client's view is kept in the background, answered from memory, and outlives a directory that fails."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from swarm_client.routing.costs import RouteWish
from swarm_client.routing.find_route import Hop, find_route
from swarm_client.routing.peer_health import PeerHealth
from swarm_client.routing.swarm_view import SwarmView
from swarm_client.routing.watcher import IDLE_S, LOOK_PAUSE_S, LOOKUP_S, SwarmWatcher
from swarm_protocol.errors import CacheFullError, MissingBlocksError, StepTimeoutError, StreamLostError
from swarm_protocol.messages import SESSION_PROTOCOL, Pong
from swarm_protocol.ping import PING_TIMEOUT_S
from swarm_protocol.records import RECORD_LIFETIME_S, directory_key, seal
from swarm_protocol.spans import Span
from swarm_protocol.transport.base import FrameStream
from swarm_protocol.transport.memory_net import LinkProfile, MemoryNetwork, MemoryTransport
from tests.node.node_scenario import MODEL, Conversation, node_record, settle, states, virtual
from tests.scenarios.client_scenario import HALVES, KEY, WHOLE, scene

PERIOD_S = 5.0


class Swarm:
    """Peers that do nothing but say in the directory that they serve, and answer pings."""

    def __init__(self) -> None:
        self.network = MemoryNetwork(directory_delay_s=0.1)
        self.client = self.network.transport()
        self.health = PeerHealth(10.0)
        self.watcher = SwarmWatcher(self.client, KEY, PERIOD_S, self.health)
        self.num_lookups = 0
        self._lookup = self.client.directory.lookup
        self.client.directory.lookup = self._counted  # type: ignore[method-assign, assignment]

    async def _counted(self, keys: list[str]) -> object:
        self.num_lookups += 1
        return await self._lookup(keys)

    async def add(self, span: Span = WHOLE, delay_s: float = 0.0) -> MemoryTransport:
        async def answer(stream: FrameStream) -> None:
            talk = Conversation(stream)
            while True:
                await talk.send(Pong((await talk.receive()).nonce))

        transport = self.network.transport()
        self.network.set_link(self.client.peer_id, transport.peer_id, LinkProfile(delay_s))
        await transport.serve(SESSION_PROTOCOL, answer)
        await self.publish(transport, span)
        return transport

    async def publish(self, transport: MemoryTransport, span: Span = WHOLE, incarnation: int = 1) -> None:
        now_s = self.network.now_s()
        record = replace(
            node_record(transport),
            start_block=span.start,
            end_block=span.end,
            state="online",
            incarnation=incarnation,
            published_s=now_s,
            expires_at_s=now_s + RECORD_LIFETIME_S,
            free_tokens=1000,
        )
        value = seal(record, self.network.identity(transport.peer_id).sign)
        await transport.directory.store(directory_key(MODEL, span.start), transport.peer_id, value, record.expires_at_s)

    async def peers(self) -> set[str]:
        return {record.peer_id for record in (await self.watcher.view()).records}


@asynccontextmanager
async def swarm() -> AsyncIterator[Swarm]:
    made = Swarm()
    yield made
    await made.watcher.close()


def find(view: SwarmView) -> list[Hop]:
    return find_route(view, KEY, RouteWish(), lambda options: options[0])


def now_s() -> float:
    return asyncio.get_running_loop().time()


@virtual
async def test_the_first_question_waits_and_later_ones_are_answered_from_memory() -> None:
    async with swarm() as s:
        node = await s.add()
        started_s = now_s()
        assert await s.peers() == {node.peer_id}
        assert now_s() - started_s == pytest.approx(0.1)
        for _ in range(20):
            await asyncio.sleep(1.7)
            started_s = now_s()
            await s.publish(node)
            started_s = now_s()
            assert await s.peers() == {node.peer_id}
            assert now_s() == started_s


@virtual
async def test_a_node_that_comes_is_seen_within_a_period() -> None:
    async with swarm() as s:
        first = await s.add()
        await s.peers()
        second = await s.add()
        assert await s.peers() == {first.peer_id}
        await asyncio.sleep(PERIOD_S + 0.2)
        assert await s.peers() == {first.peer_id, second.peer_id}


@virtual
async def test_who_waits_for_a_node_makes_the_watcher_look_each_second() -> None:
    async with swarm() as s:
        first = await s.add()
        await s.peers()
        await asyncio.sleep(LOOK_PAUSE_S)
        second, num_before = await s.add(), s.num_lookups
        for _ in range(5):
            s.watcher.look_soon()
            await asyncio.sleep(0.15)
        assert s.num_lookups == num_before + 1
        assert await s.peers() == {first.peer_id, second.peer_id}


@virtual
async def test_questions_at_the_same_time_cost_one_look() -> None:
    async with swarm() as s:
        await s.add()
        await asyncio.gather(*(s.peers() for _ in range(10)))
        assert s.num_lookups == 1


@virtual
async def test_a_directory_that_fails_leaves_the_last_view() -> None:
    async with swarm() as s:
        node = await s.add()
        await s.peers()

        async def fail(keys: list[str]) -> object:
            raise OSError("the daemon is gone")

        s.client.directory.lookup = fail  # type: ignore[method-assign, assignment]
        await asyncio.sleep(100)
        assert await s.peers() == {node.peer_id}
        await s.watcher.refresh()
        assert await s.peers() == {node.peer_id}


@virtual
async def test_a_directory_that_never_answered_is_an_error_and_asked_again() -> None:
    async with swarm() as s:
        node = await s.add()
        s.network.freeze(s.client.peer_id)
        started_s = now_s()
        with pytest.raises(StepTimeoutError, match="directory"):
            await s.peers()
        assert now_s() - started_s == pytest.approx(LOOKUP_S)
        s.network.thaw(s.client.peer_id)
        await s.publish(node)
        assert await s.peers() == {node.peer_id}


@virtual
async def test_a_client_that_asks_no_more_reads_no_more_and_begins_anew() -> None:
    async with swarm() as s:
        node = await s.add()
        await s.peers()
        await asyncio.sleep(IDLE_S + PERIOD_S + 1)
        num_lookups = s.num_lookups
        await asyncio.sleep(3600)
        assert s.num_lookups == num_lookups
        await s.publish(node)
        assert await s.peers() == {node.peer_id}
        assert s.num_lookups == num_lookups + 1


@virtual
async def test_a_route_that_is_not_found_in_memory_is_looked_for_in_the_directory() -> None:
    async with swarm() as s:
        first = await s.add(HALVES[0])
        with pytest.raises(MissingBlocksError):
            await s.watcher.find(find)
        second = await s.add(HALVES[1])
        assert [hop.peer_id for hop in await s.watcher.find(find)] == [first.peer_id, second.peer_id]


@virtual
async def test_pings_are_measured_and_decide() -> None:
    async with swarm() as s:
        near, far = await s.add(delay_s=0.01), await s.add(delay_s=0.1)
        await s.peers()
        await asyncio.sleep(1)
        view = await s.watcher.view()
        assert view.pings_s == {near.peer_id: pytest.approx(0.02), far.peer_id: pytest.approx(0.2)}
        assert [hop.peer_id for hop in await s.watcher.find(find)] == [near.peer_id]


@virtual
async def test_a_node_that_answers_no_ping_is_avoided_and_back_when_it_does() -> None:
    async with swarm() as s:
        node = await s.add()
        s.network.freeze(node.peer_id)
        await s.peers()
        await asyncio.sleep(PING_TIMEOUT_S + 0.1)
        assert s.watcher.avoided == {node.peer_id}
        s.network.thaw(node.peer_id)
        for _ in range(4):
            await s.publish(node)
            await asyncio.sleep(PERIOD_S)
            await s.peers()
        assert not s.watcher.avoided


@virtual
async def test_a_node_that_failed_is_avoided_until_it_proves_alive_or_restarts() -> None:
    async with swarm() as s:
        node = await s.add()
        await s.peers()
        await asyncio.sleep(1)
        s.watcher.failed(node.peer_id, StreamLostError("lost"))
        await s.watcher.refresh()
        await asyncio.sleep(20)
        assert s.watcher.avoided == {node.peer_id}  # it lives, but has not said so since
        await s.publish(node)
        await asyncio.sleep(2 * PERIOD_S)
        assert not s.watcher.avoided
        s.watcher.failed(node.peer_id, StreamLostError("lost"))
        await s.publish(node, incarnation=2)
        await s.watcher.refresh()
        assert not s.watcher.avoided


@virtual
async def test_a_full_node_is_avoided_until_its_next_record() -> None:
    async with swarm() as s:
        node = await s.add()
        await s.peers()
        s.watcher.failed(node.peer_id, CacheFullError(10, 0))
        await s.watcher.refresh()
        assert s.watcher.avoided == {node.peer_id}
        await asyncio.sleep(1)
        await s.publish(node)
        await s.watcher.refresh()
        assert not s.watcher.avoided


@virtual
async def test_closing_ends_what_goes_on_in_the_background() -> None:
    async with swarm() as s:
        await s.add()
        await s.peers()
        await s.watcher.close()
        await asyncio.sleep(0)
        names = {task.get_name() for task in asyncio.all_tasks()}
        assert not {name for name in names if name.startswith("swarm")}


@virtual
async def test_a_failure_of_one_session_is_known_to_all_and_a_liar_is_found_out() -> None:
    async with scene(WHOLE, WHOLE) as s:
        liar, honest = (served.transport.peer_id for served in s.nodes)
        for peer in (liar, honest):
            s.network.set_link(s.client.peer_id, peer, LinkProfile(0.05))
        await s.session.open(1)
        await asyncio.sleep(1)  # for the pings
        chosen, other = s.session.route[0].peer_id, ({liar, honest} - {s.session.route[0].peer_id}).pop()
        s.network.set_link(s.client.peer_id, chosen, LinkProfile(0.5))  # as if it computed for 0.9 s
        await s.steps(states(3))
        watcher = s.session._watcher
        own = (await watcher.view()).own[chosen]
        assert own.is_recent
        assert own.block_s == pytest.approx(0.9 / KEY.num_blocks, rel=0.01)
        assert [hop.peer_id for hop in await watcher.find(find)] == [other]
        await settle()
