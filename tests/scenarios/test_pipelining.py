"""A long input goes through a route in pieces, several at once, and comes out as if it had gone in one."""

import asyncio
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server_node.downstream import Downstream
from swarm_client.pipeline import LEAST_TOKENS, piece_tokens
from swarm_protocol.errors import InvalidTensorError
from swarm_protocol.messages import Onward, Step, WireTensor
from swarm_protocol.spans import Span
from swarm_protocol.tensors import from_wire, to_wire
from swarm_protocol.transport.memory_net import LinkProfile
from swarm_protocol.transport.virtual_clock import run_virtual
from tests.node.node_scenario import states, virtual
from tests.scenarios.client_scenario import CONFIG, HALVES, Scene, local_output, now_s, scene
from tests.tiny_models import NUM_BLOCKS

TOKENS = 300
THIRDS = (Span(0, 2), Span(2, 4), Span(4, NUM_BLOCKS))
LONG = replace(CONFIG, max_wait_s=60.0, resume_s=3.0, step_s=10.0)


async def run(s: Scene, tokens: torch.Tensor, position: int = 0) -> tuple[torch.Tensor, list[int]]:
    """Return the outputs, and how long the pieces were."""

    def cut(start: int, end: int) -> WireTensor:
        return to_wire(tokens[:, start:end])

    outputs = [from_wire(result.outputs[-1]) for result in await s.session.run(cut, tokens.shape[1], position)]
    return torch.cat(outputs, dim=1), [output.shape[1] for output in outputs]


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@virtual
async def test_pieces_are_under_way_at_several_nodes_at_once() -> None:
    async with scene(*THIRDS, max_length=TOKENS) as s:
        for served, after in zip(s.nodes, (*s.nodes[1:], None), strict=True):
            s.set_delay(s.client, served.transport, 0.1)
            if after is not None:
                s.set_delay(served.transport, after.transport, 0.1)
        await s.session.open(TOKENS)
        await run(s, states(1))  # the nodes know each other
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("swarm_client.pipeline.piece_tokens", lambda *_: LEAST_TOKENS)
            started_s = now_s()
            found, widths = await run(s, states(TOKENS))
        assert widths == [128, 64, 64, 44]
        # A piece sets out when the one before is done at the first node, and takes 4 ways round.
        assert now_s() - started_s == pytest.approx((len(widths) - 1) * 0.2 + 4 * 0.1)
        assert_close(found, local_output(states(TOKENS)))
        again = await s.session.step(to_wire(states(TOKENS)[:, -1:]), TOKENS - 1)
        assert_close(from_wire(again.outputs[-1]), found[:, -1:])


@virtual
async def test_pieces_that_overtake_one_that_got_lost_between_nodes_cost_no_node() -> None:
    async with scene(*THIRDS, max_length=TOKENS) as s:
        for served in s.nodes:
            s.set_delay(s.client, served.transport, 0.1)
        s.set_delay(s.nodes[0].transport, s.nodes[1].transport, 0.1)
        await s.session.open(TOKENS)
        num_failed = 0
        push = Downstream.push

        async def fails_once(downstream: Downstream, step: Step, to: Onward) -> bool:
            nonlocal num_failed
            if to.peer_id == s.nodes[2].transport.peer_id and not num_failed:
                num_failed += 1
                return False
            return await push(downstream, step, to)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("swarm_client.pipeline.piece_tokens", lambda *_: LEAST_TOKENS)
            patch.setattr(Downstream, "push", fails_once)
            found, _ = await run(s, states(TOKENS))
        assert num_failed == 1
        assert_close(found, local_output(states(TOKENS)))
        assert [served.worker.num_tokens for served in s.nodes] == [TOKENS] * 3  # nobody was replaced


@virtual
async def test_a_drop_while_nodes_are_ahead_of_what_the_client_knows_costs_no_node() -> None:
    async with scene(*HALVES, max_length=TOKENS) as s:
        first, last = s.nodes
        s.set_delay(s.client, first.transport, 0.01)
        s.set_delay(s.client, last.transport, 0.2)
        await s.session.open(TOKENS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("swarm_client.pipeline.piece_tokens", lambda *_: LEAST_TOKENS)
            running = asyncio.create_task(run(s, states(TOKENS)))
            await asyncio.sleep(0.15)
            assert last.worker.num_steps > 1  # whose replies are on their way
            s.network.break_streams(s.client.peer_id, last.transport.peer_id)
            found, _ = await running
        assert_close(found, local_output(states(TOKENS)))
        assert [served.worker.num_tokens for served in s.nodes] == [TOKENS] * 2  # nobody was replaced


@virtual
async def test_what_the_caller_did_wrong_is_its_error_and_the_session_goes_on() -> None:
    async with scene(*HALVES, max_length=TOKENS) as s:
        await s.session.open(TOKENS)
        wrong = states(TOKENS).clone()
        wrong[:, 200] = torch.nan
        with pytest.raises(InvalidTensorError, match="not finite"):
            await run(s, wrong)
        assert_close((await run(s, states(TOKENS)))[0], local_output(states(TOKENS)))


@virtual
async def test_a_cancelled_run_leaves_the_session_usable() -> None:
    async with scene(*HALVES, max_length=TOKENS) as s:
        for served in s.nodes:
            s.network.set_link(s.client.peer_id, served.transport.peer_id, LinkProfile(0.1))
        await s.session.open(TOKENS)
        running = asyncio.create_task(run(s, states(TOKENS)))
        await asyncio.sleep(0.35)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert_close((await run(s, states(TOKENS)))[0], local_output(states(TOKENS)))


@settings(max_examples=60, deadline=None)
@given(
    after_s=st.floats(0.0, 2.0),
    what=st.sampled_from(["kill", "freeze", "break"]),
    victim=st.integers(0, 1),
    start=st.integers(0, 50),
)
def test_a_node_may_fail_in_the_middle_of_a_prefill(after_s: float, what: str, victim: int, start: int) -> None:
    async def disturbed() -> None:
        async with scene(*HALVES, config=LONG, max_length=TOKENS) as s:
            for served in s.nodes:
                s.network.set_link(s.client.peer_id, served.transport.peer_id, LinkProfile(0.1))
            tokens = states(TOKENS)
            await s.session.open(TOKENS)
            await s.add_node(HALVES[victim])
            if start:
                await run(s, tokens[:, :start])
            peer_id = s.nodes[victim].transport.peer_id
            act = {"kill": s.network.kill, "freeze": s.network.freeze}.get(
                what, lambda peer_id: s.network.break_streams(s.client.peer_id, peer_id)
            )
            asyncio.get_running_loop().call_later(after_s, act, peer_id)
            found, _ = await run(s, tokens[:, start:], start)
            assert_close(found, local_output(tokens)[:, start:])
            await asyncio.sleep(3.0)
            last = await s.session.step(to_wire(tokens[:, -1:]), TOKENS - 1)
            assert_close(from_wire(last.outputs[-1]), local_output(tokens)[:, -1:])
            s.network.thaw(peer_id)

    run_virtual(disturbed())


@pytest.mark.parametrize(
    ("hops", "trip_s", "token_s", "wanted"),
    [
        (1, 0.002, 0.001, 512),  # nothing to overlap
        (2, 0.002, 0.0013, LEAST_TOKENS),  # a CPU nearby
        (2, 0.05, 0.00003, 512),  # a GPU far away: trips are what costs
        (4, 0.05, 0.0005, 183),
        (2, 0.0, 0.0013, LEAST_TOKENS),
        (2, 0.05, 0.0, 512),
    ],
)
def test_pieces_are_as_large_as_trips_are_long(hops: int, trip_s: float, token_s: float, wanted: int) -> None:
    assert piece_tokens(1000, hops, trip_s, token_s, 512) == wanted


@given(
    num_left=st.integers(LEAST_TOKENS, 5000),
    hops=st.integers(2, 8),
    trip_s=st.floats(1e-3, 0.3),
    token_s=st.floats(1e-5, 1e-2),
)
def test_no_other_size_is_much_faster(num_left: int, hops: int, trip_s: float, token_s: float) -> None:
    def taken_s(width: int) -> float:
        return (num_left / width + hops - 1) * (trip_s + width * token_s)

    chosen = piece_tokens(num_left, hops, trip_s, token_s, 512)
    assert taken_s(chosen) <= 1.01 * min(taken_s(width) for width in range(LEAST_TOKENS, 513))
