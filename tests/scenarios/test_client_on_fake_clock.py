"""A client's session against real and broken nodes on the network in memory; no test waits for real time."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch

from server_node.config import NodeLimits
from swarm_client.node_line import NOTICE_S
from swarm_client.routing.link_health import RETRY_S
from swarm_client.routing.peer_health import PeerHealth
from swarm_client.routing.watcher import LOOKUP_S, SwarmWatcher
from swarm_client.row_groups import open_together
from swarm_client.swarm_session import SwarmSession
from swarm_protocol.errors import (
    CacheFullError,
    MissingBlocksError,
    ProtocolError,
    SessionClosedError,
    StepTimeoutError,
)
from swarm_protocol.messages import (
    OpenSession,
    ResumeSession,
    SessionOpened,
    SessionResumed,
    Step,
    StepReply,
    error_reply,
)
from swarm_protocol.records import REFRESH_PERIOD_S
from swarm_protocol.spans import Span
from swarm_protocol.tape import TapeBudget
from swarm_protocol.tensors import from_wire, to_wire
from swarm_protocol.transport.memory_net import LinkProfile
from tests.node.node_scenario import (
    HIDDEN,
    Conversation,
    settle,
    states,
    virtual,
)
from tests.scenarios.client_scenario import (
    CONFIG,
    HALVES,
    KEY,
    PREFIX_KEY,
    add_scripted_node,
    local_output,
    now_s,
    scene,
    span_module,
)
from tests.tiny_models import NUM_BLOCKS


@virtual
async def test_a_frozen_node_that_nobody_can_replace_times_out_at_the_deadline() -> None:
    async with scene(*HALVES, config=replace(CONFIG, max_wait_s=0.0)) as s:
        await s.session.open(1)
        s.network.freeze(s.nodes[1].transport.peer_id)
        started_s = now_s()
        with pytest.raises(MissingBlocksError, match="blocks 2–4") as caught:
            await s.steps(states(1))
        waited_s = now_s() - started_s
        assert waited_s == pytest.approx(NodeLimits().join_s + CONFIG.step_s, abs=1e-6)
        assert isinstance(caught.value.__context__, StepTimeoutError)
        s.network.thaw(s.nodes[1].transport.peer_id)
        await asyncio.sleep(REFRESH_PERIOD_S + 1)  # it says that it lives
        torch.testing.assert_close(await s.steps(states(4)), local_output(states(4)), rtol=1e-5, atol=1e-5)


@virtual
async def test_a_frozen_node_that_nobody_can_replace_may_go_on_late() -> None:
    async with scene(*HALVES) as s:
        await s.session.open(1)
        s.network.freeze(s.nodes[1].transport.peer_id)
        asyncio.get_running_loop().call_later(15.0, s.network.thaw, s.nodes[1].transport.peer_id)
        torch.testing.assert_close(await s.steps(states(4)), local_output(states(4)), rtol=1e-5, atol=1e-5)
        assert s.nodes[1].worker.num_steps == 4  # on its old cache: nothing was computed again


@virtual
async def test_a_step_goes_round_the_ring() -> None:
    async with scene(*HALVES) as s:
        first, second = (served.transport for served in s.nodes)
        s.set_delay(s.client, first, 0.02)
        s.set_delay(s.client, second, 0.05)
        s.set_delay(first, second, 0.04)
        started_s = now_s()
        await s.session.open(1)
        assert now_s() - started_s == pytest.approx(4 * 0.05)  # both at once: a dial and a question
        started_s = now_s()
        await s.steps(states(1))
        assert now_s() - started_s == pytest.approx(0.02 + 5 * 0.04 + 0.05)  # one node has dialed and asked the other
        started_s = now_s()
        await s.steps(states(4)[:, 1:], first=1)
        assert now_s() - started_s == pytest.approx(3 * (0.02 + 0.04 + 0.05))


@virtual
async def test_states_after_every_span_come_through_the_client() -> None:
    async with scene(*HALVES) as s:
        for served, delay_s in zip(s.nodes, (0.02, 0.05), strict=True):
            s.set_delay(s.client, served.transport, delay_s)
        await s.session.open(1)
        started_s = now_s()
        result = await s.session.step(to_wire(states(3)), 0, every_span=True)
        assert now_s() - started_s == pytest.approx(2 * (0.02 + 0.05))
        after_first = span_module(HALVES[0])(states(3))
        for found, wanted in zip(result.outputs, (after_first, local_output(states(3))), strict=True):
            torch.testing.assert_close(from_wire(found), wanted, rtol=1e-5, atol=1e-5)


@virtual
async def test_a_step_comes_through_the_client_where_two_nodes_do_not_reach_each_other() -> None:
    async with scene(Span(0, 2), Span(2, 4), Span(4, NUM_BLOCKS)) as s:
        nodes = [served.transport for served in s.nodes]
        for node in nodes:
            s.set_delay(s.client, node, 0.1)
        s.network.cut(nodes[0].peer_id, nodes[1].peer_id)
        await s.session.open(1)
        first = await s.steps(states(1))
        started_s = now_s()
        rest = await s.steps(states(4)[:, 1:], first=1)
        assert now_s() - started_s == pytest.approx(3 * 4 * 0.1)  # there and back, and round the other two
        torch.testing.assert_close(torch.cat([first, rest], dim=1), local_output(states(4)), rtol=1e-5, atol=1e-5)
        assert [served.worker.num_steps for served in s.nodes] == [4, 4, 4]
        s.network.mend(nodes[0].peer_id, nodes[1].peer_id)
        await asyncio.sleep(RETRY_S)
        await s.steps(states(5)[:, 4:], first=4)
        started_s = now_s()
        await s.steps(states(6)[:, 5:], first=5)
        assert now_s() - started_s == pytest.approx(2 * 0.1)


@virtual
async def test_a_way_between_nodes_that_breaks_is_gone_round() -> None:
    async with scene(*HALVES) as s:
        await s.session.open(1)
        first = await s.steps(states(2))
        s.network.cut(s.nodes[0].transport.peer_id, s.nodes[1].transport.peer_id)
        started_s = now_s()
        rest = await s.steps(states(6)[:, 2:], first=2)
        assert now_s() - started_s < NOTICE_S + 0.1
        torch.testing.assert_close(torch.cat([first, rest], dim=1), local_output(states(6)), rtol=1e-5, atol=1e-5)
        assert [served.worker.num_steps for served in s.nodes] == [6, 6]


@pytest.mark.parametrize("after_frames", range(20))
@virtual
async def test_the_stream_between_two_nodes_may_drop_at_any_frame(after_frames: int) -> None:
    async with scene(*HALVES) as s:
        await s.session.open(1)
        s.network.break_streams(s.nodes[0].transport.peer_id, s.nodes[1].transport.peer_id, after_frames=after_frames)
        found = await s.steps(states(10))
        torch.testing.assert_close(found, local_output(states(10)), rtol=1e-5, atol=1e-5)
        assert [served.worker.num_steps for served in s.nodes] == [10, 10]


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
async def test_blocks_that_nobody_serves_any_more_are_named_when_the_wait_is_over() -> None:
    async with scene(*HALVES) as s:
        await s.session.open(1)
        await s.steps(states(2))
        s.kill(1)
        started_s = now_s()
        with pytest.raises(MissingBlocksError, match="blocks 2–4") as caught:
            await s.steps(states(1), first=2)
        assert caught.value.retryable
        waited_s = now_s() - started_s
        assert CONFIG.max_wait_s <= waited_s <= s.network.detection_s + CONFIG.resume_s + CONFIG.max_wait_s + 1.0


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
        watcher = SwarmWatcher(s.client, KEY, 0.0, PeerHealth(1.0))
        too_long = SwarmSession(s.client, watcher, CONFIG, KEY, 1, 10_000, PREFIX_KEY, TapeBudget(1 << 20))
        with pytest.raises(CacheFullError):
            await open_together([s.session, too_long], [1, 500], None)
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
