"""A dropped stream: what is kept, for whom, and for how long."""

import asyncio
from dataclasses import replace

import pytest

from swarm_protocol.messages import CloseSession, SessionClosed, SessionResumed, Step
from swarm_protocol.tensors import to_wire
from tests.node.node_scenario import (
    CACHE_TOKENS,
    assert_error,
    assert_output,
    ended,
    local_output,
    resume,
    serving_node,
    settle,
    states,
    virtual,
)


@virtual
async def test_a_step_that_runs_on_while_the_stream_is_gone_is_answered_after_a_resume():
    async with serving_node() as node:
        peer = node.network.transport()
        talk, opened = await node.open(peer)
        node.worker.gate.clear()
        await talk.send(Step(1, 0, to_wire(states(4))))
        await settle()
        await talk.stream.close()
        await settle()
        node.worker.gate.set()
        await asyncio.sleep(30)
        again = await node.dial(peer)
        assert await again.ask(resume(opened, 0)) == SessionResumed(last_step_id=1, position=4)
        assert_output(await again.receive(), local_output(states(4)))
        assert_output(await again.step(2, 0, states(3)), local_output(states(3)))
        assert await again.ask(CloseSession()) == SessionClosed()
        await node.assert_clean()


@virtual
async def test_a_step_that_still_runs_at_the_resume_is_answered_on_the_new_stream():
    async with serving_node() as node:
        peer = node.network.transport()
        talk, opened = await node.open(peer)
        node.worker.gate.clear()
        await talk.send(Step(1, 0, to_wire(states(4))))
        await settle()
        await talk.stream.close()
        again = await node.dial(peer)
        assert await again.ask(resume(opened, 0)) == SessionResumed(last_step_id=1, position=4)
        node.worker.gate.set()
        assert_output(await again.receive(), local_output(states(4)))


@virtual
async def test_nothing_is_sent_again_that_arrived_and_a_lost_step_may_come_again():
    async with serving_node() as node:
        peer = node.network.transport()
        talk, opened = await node.open(peer)
        await talk.step(1, 0, states(2))
        await talk.stream.close()
        again = await node.dial(peer)
        assert await again.ask(resume(opened, 1)) == SessionResumed(last_step_id=1, position=2)
        tokens = states(2)
        assert_output(await again.step(2, 0, tokens), local_output(tokens))


@virtual
async def test_a_failed_step_is_kept_like_any_other():
    async with serving_node() as node:
        peer = node.network.transport()
        talk, opened = await node.open(peer)
        error = await talk.step(1, 0, states(2) * float("nan"))
        await talk.stream.close()
        again = await node.dial(peer)
        assert await again.ask(resume(opened, 0)) == SessionResumed(last_step_id=1, position=0)
        assert await again.receive() == error


@virtual
async def test_a_resume_takes_the_session_from_a_stream_that_looks_alive():
    async with serving_node() as node:
        peer = node.network.transport()
        talk, opened = await node.open(peer)
        again = await node.dial(peer)
        assert isinstance(await again.ask(resume(opened, 0)), SessionResumed)
        assert await ended(talk)
        assert_output(await again.step(1, 0, states(2)), local_output(states(2)))
        await asyncio.sleep(100)
        assert_output(await again.step(2, 0, states(2)), local_output(states(2)))


@virtual
async def test_only_the_peer_with_the_token_may_resume():
    async with serving_node() as node:
        peer = node.network.transport()
        talk, opened = await node.open(peer)
        await talk.step(1, 0, states(2))
        wrong = replace(opened, resume_token=bytes(16))
        stranger = await node.dial()
        assert_error(await stranger.ask(resume(opened, 1)), "session_not_found")
        again = await node.dial(peer)
        assert_error(await again.ask(resume(wrong, 1)), "session_not_found")
        assert_error(await again.ask(resume(opened, 1, b"z" * 16)), "session_not_found")
        assert_output(await talk.step(2, 0, states(2)), local_output(states(2)))


@pytest.mark.parametrize("claim", [2, 1 << 60])
def test_a_claim_to_have_what_was_never_sent_is_refused(claim: int):
    @virtual
    async def scenario() -> None:
        async with serving_node() as node:
            peer = node.network.transport()
            talk, opened = await node.open(peer)
            await talk.step(1, 0, states(2))
            again = await node.dial(peer)
            assert_error(await again.ask(resume(opened, claim)), "step_order")
            assert await ended(again)
            assert_output(await talk.step(2, 0, states(2)), local_output(states(2)))

    scenario()


@virtual
async def test_a_session_that_nobody_resumes_is_freed_after_its_grace():
    async with serving_node(resume_grace_s=60.0) as node:
        peer = node.network.transport()
        talk, opened = await node.open(peer)
        await talk.step(1, 0, states(2))
        await talk.stream.close()
        await asyncio.sleep(59)
        assert node.free_tokens == CACHE_TOKENS - 20
        await asyncio.sleep(2)
        await node.assert_clean()
        again = await node.dial(peer)
        assert_error(await again.ask(resume(opened, 1)), "session_not_found")


@virtual
async def test_each_drop_has_a_grace_of_its_own():
    async with serving_node(resume_grace_s=60.0) as node:
        peer = node.network.transport()
        talk, opened = await node.open(peer)
        await talk.step(1, 0, states(1))
        for _ in range(3):
            await talk.stream.close()
            await asyncio.sleep(50)
            talk = await node.dial(peer)
            await talk.ask(resume(opened, 1))
        assert_output(await talk.step(2, 0, states(2)), local_output(states(2)))


@virtual
async def test_a_session_that_was_never_used_ends_with_its_stream():
    async with serving_node() as node:
        peer = node.network.transport()
        talk, opened = await node.open(peer)
        await talk.stream.close()
        await node.assert_clean()
        talk = await node.dial(peer)
        assert_error(await talk.ask(resume(opened, 0)), "session_not_found")


@virtual
async def test_a_peer_that_dies_during_a_step_frees_its_session_after_the_grace():
    async with serving_node() as node:
        peer = node.network.transport()
        talk, _ = await node.open(peer)
        node.worker.gate.clear()
        await talk.send(Step(1, 0, to_wire(states(4))))
        await settle()
        node.network.kill(peer.peer_id)
        await asyncio.sleep(70)
        assert node.free_tokens == CACHE_TOKENS - 20
        node.worker.gate.set()
        await node.assert_clean()
