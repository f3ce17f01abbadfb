"""What a session sees of a node: opening, steps, rollback, beams, close, and what they cost while they last."""

import asyncio

import pytest
import torch

from swarm_protocol.messages import (
    MAX_BATCH_ROWS,
    CloseSession,
    Ping,
    Pong,
    SessionClosed,
    SessionOpened,
    Step,
)
from swarm_protocol.spans import Span
from swarm_protocol.tensors import to_wire
from tests.node.node_scenario import (
    CACHE_TOKENS,
    assert_error,
    assert_output,
    ended,
    forward,
    local_output,
    open_session,
    serving_node,
    settle,
    states,
    virtual,
)


@virtual
async def test_prefill_and_decode_equal_the_local_span_and_closing_frees_all():
    async with serving_node() as node:
        talk, opened = await node.open()
        assert opened.version == 1
        assert opened.resume_grace_s == 60
        assert node.free_tokens == CACHE_TOKENS - 20
        tokens = states(8)
        expected = local_output(tokens)
        assert_output(await talk.step(1, 0, tokens[:, :5]), expected[:, :5])
        for step_id, position in ((2, 5), (3, 6), (4, 7)):
            reply = await talk.step(step_id, position, tokens[:, position : position + 1])
            assert_output(reply, expected[:, position : position + 1])
            assert reply.step_id == step_id
            assert reply.compute_s > 0
        assert await talk.ask(CloseSession()) == SessionClosed()
        assert await ended(talk)
        await node.assert_clean()


@virtual
async def test_a_lower_position_rolls_back():
    async with serving_node() as node:
        talk, _ = await node.open()
        first, second = states(6), states(3, seed=1)
        await talk.step(1, 0, first)
        joined = torch.cat([first[:, :2], second], dim=1)
        assert_output(await talk.step(2, 2, second), local_output(joined)[:, 2:])
        assert (await talk.step(3, 1, states(0))).hidden_states.shape == (1, 0, 32)
        again = torch.cat([first[:, :1], second], dim=1)
        assert_output(await talk.step(4, 1, second), local_output(again)[:, 1:])


@virtual
async def test_rows_are_permuted_before_a_step():
    async with serving_node() as node:
        talk, _ = await node.open(batch_size=2)
        first, second = states(4, rows=2), states(1, rows=2, seed=1)
        await talk.step(1, 0, first)
        reply = await talk.step(2, 4, second, row_order=(1, 1))
        assert_output(reply, local_output(torch.cat([first[[1, 1]], second], dim=1))[:, 4:])


@virtual
async def test_a_session_may_use_a_part_of_the_span():
    async with serving_node() as node:
        talk, _ = await node.open(start_block=2, end_block=3)
        assert node.node.admission.free_token_blocks == 3 * CACHE_TOKENS - 20
        assert_output(await talk.step(1, 0, states(4)), local_output(states(4), Span(2, 3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_reply_has_the_dtype_of_the_step(dtype: torch.dtype):
    @virtual
    async def scenario() -> None:
        async with serving_node() as node:
            talk, _ = await node.open()
            tokens = states(3).to(dtype)
            reply = await talk.step(1, 0, tokens)
            assert reply.hidden_states.dtype == str(dtype).removeprefix("torch.")
            assert_output(reply, local_output(tokens.float()).to(dtype))

    scenario()


@virtual
async def test_a_step_of_many_frames_arrives_whole():
    # 256 rows of 80 tokens are 2.6 MB: two frames each way.
    async with serving_node(max_step_tokens=1 << 15) as node:
        node.node.admission.free_token_blocks = 1 << 20
        talk, _ = await node.open(batch_size=MAX_BATCH_ROWS, max_tokens=80)
        tokens = states(80, rows=MAX_BATCH_ROWS)
        assert_output(await talk.step(1, 0, tokens), local_output(tokens))


@virtual
async def test_sessions_of_many_peers_do_not_disturb_each_other():
    async with serving_node() as node:

        async def chat(seed: int) -> None:
            talk, _ = await node.open()
            tokens = states(6, seed=seed)
            for step_id in range(1, 7):
                reply = await talk.step(step_id, step_id - 1, tokens[:, step_id - 1 : step_id])
                assert_output(reply, local_output(tokens)[:, step_id - 1 : step_id])
            assert await talk.ask(CloseSession()) == SessionClosed()

        await asyncio.gather(*(chat(seed) for seed in range(5)))
        await node.assert_clean()


@virtual
async def test_a_full_cache_refuses_until_a_session_is_closed():
    async with serving_node() as node:
        talk, _ = await node.open(max_tokens=CACHE_TOKENS)
        other = await node.dial()
        assert_error(await other.ask(open_session()), "cache_full")
        await talk.ask(CloseSession())
        assert isinstance(await other.ask(open_session()), SessionOpened)


@virtual
async def test_a_session_id_is_one_session_of_its_peer_and_says_nothing_of_others():
    async with serving_node() as node:
        peer = node.network.transport()
        await node.open(peer)
        again = await node.dial(peer)
        assert_error(await again.ask(open_session()), "invalid_request")
        await node.open()
        assert node.free_tokens == CACHE_TOKENS - 40


@virtual
async def test_pings_are_answered_before_a_session_in_it_and_while_a_step_runs():
    async with serving_node() as node:
        talk = await node.dial()
        assert await talk.ask(Ping(7)) == Pong(7)
        await talk.ask(open_session())
        node.worker.gate.clear()
        await talk.send(Step(1, 0, to_wire(states(2))))
        assert await talk.ask(Ping(8)) == Pong(8, last_step_id=1)
        node.worker.gate.set()
        assert (await talk.receive()).step_id == 1
        compute = await node.dial_compute()
        assert await compute.ask(Ping(9)) == Pong(9)


@virtual
async def test_closing_during_a_step_frees_the_cache_when_the_step_has_ended():
    async with serving_node() as node:
        talk, _ = await node.open()
        node.worker.gate.clear()
        await talk.send(Step(1, 0, to_wire(states(2))))
        await settle()
        await talk.send(CloseSession())
        await settle()
        assert node.free_tokens == CACHE_TOKENS - 20
        node.worker.gate.set()
        assert await talk.receive() == SessionClosed()
        await node.assert_clean()


@virtual
async def test_a_session_without_steps_is_closed_after_a_while():
    async with serving_node(idle_s=100.0) as node:
        talk, _ = await node.open()
        await asyncio.sleep(60)
        await talk.step(1, 0, states(2))
        await asyncio.sleep(60)
        assert await talk.ask(Ping(1)) == Pong(1, last_step_id=1)
        await asyncio.sleep(39)
        assert len(node.node.sessions) == 1
        await asyncio.sleep(2)
        assert_error(await talk.receive(), "session_closed")
        assert await ended(talk)
        await node.assert_clean()


@virtual
async def test_a_long_step_is_not_idleness():
    async with serving_node(idle_s=100.0) as node:
        talk, _ = await node.open()
        node.worker.gate.clear()
        await talk.send(Step(1, 0, to_wire(states(2))))
        await asyncio.sleep(350)
        node.worker.gate.set()
        assert_output(await talk.receive(), local_output(states(2)))
        await asyncio.sleep(99)
        assert_output(await talk.step(2, 0, states(2)), local_output(states(2)))


@virtual
async def test_a_forward_pass_equals_the_span_without_a_cache():
    async with serving_node() as node:
        talk = await node.dial_compute()
        tokens = states(5, rows=3)
        assert_output(await talk.ask(forward(tokens)), local_output(tokens))
        part = await talk.ask(forward(tokens, request_id=2, start_block=3))
        assert part.request_id == 2
        assert_output(part, local_output(tokens, Span(3, 4)))
        assert node.free_tokens == CACHE_TOKENS
        await talk.stream.close()
        await node.assert_clean()
