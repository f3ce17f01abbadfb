"""Sessions go on, with the same outputs, while nodes die, freeze, leave, run full and answer wrongly."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from swarm_client.node_line import NOTICE_S
from swarm_protocol.errors import CacheFullError, InvalidTensorError, MissingBlocksError, SessionClosedError, SwarmError
from swarm_protocol.messages import OpenSession, Ping, Pong, SessionOpened, Step, StepReply, error_reply
from swarm_protocol.spans import Span
from swarm_protocol.tensors import from_wire, to_wire
from swarm_protocol.transport.virtual_clock import run_virtual
from tests.node.node_scenario import HIDDEN, Conversation, settle, states, virtual
from tests.scenarios.client_scenario import (
    CONFIG,
    HALVES,
    WHOLE,
    Answer,
    Scene,
    add_scripted_node,
    local_output,
    now_s,
    scene,
    span_module,
)
from tests.tiny_models import NUM_BLOCKS

SECOND = HALVES[1]


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def in_use(s: Scene) -> set[object]:
    return {hop.peer_id for hop in s.session.route}


def used_index(s: Scene, span: Span) -> int:
    """Which of the nodes that serve `span` the session uses."""
    return next(i for i, n in enumerate(s.nodes) if n.worker.span == span and n.transport.peer_id in in_use(s))


@virtual
async def test_a_killed_node_is_replaced_and_the_others_compute_nothing_again() -> None:
    async with scene(HALVES[0], SECOND, SECOND) as s:
        await s.session.open(1)
        first = await s.steps(states(4))
        s.kill(used_index(s, SECOND))
        started_s = now_s()
        rest = await s.steps(states(10)[:, 4:], first=4)
        assert now_s() - started_s < 1.0
        assert_close(torch.cat([first, rest], dim=1), local_output(states(10)))
        assert s.nodes[0].worker.num_steps == 10


@virtual
async def test_several_shorter_spans_take_over_from_one() -> None:
    async with scene(HALVES[0], SECOND) as s:
        await s.session.open(1)
        first = await s.steps(states(4))
        await s.add_node(Span(1, 3))
        await s.add_node(Span(3, 4))
        await s.add_node(Span(4, NUM_BLOCKS))
        s.kill(1)
        rest = await s.steps(states(10)[:, 4:], first=4)
        assert [hop.span for hop in s.session.route] == [HALVES[0], Span(2, 3), Span(3, 4), Span(4, NUM_BLOCKS)]
        s.kill(3)  # the new hops have tapes of their own
        await s.add_node(Span(3, NUM_BLOCKS))
        again = await s.steps(states(12)[:, 10:], first=10)
        assert_close(torch.cat([first, rest, again], dim=1), local_output(states(12)))


@virtual
async def test_a_frozen_node_is_found_out_within_a_second_and_a_bit() -> None:
    async with scene(HALVES[0], SECOND, SECOND) as s:
        await s.session.open(1)
        first = await s.steps(states(4))
        s.network.freeze(s.nodes[used_index(s, SECOND)].transport.peer_id)
        started_s = now_s()
        rest = await s.steps(states(10)[:, 4:], first=4)
        assert NOTICE_S <= now_s() - started_s < NOTICE_S + 0.2
        assert_close(torch.cat([first, rest], dim=1), local_output(states(10)))
        for served in s.nodes:
            s.network.thaw(served.transport.peer_id)


@virtual
async def test_a_node_that_is_slow_but_alive_keeps_its_session() -> None:
    async with scene(HALVES[0]) as s:

        async def compute_slowly(talk: Conversation, message: Any) -> None:
            match message:
                case OpenSession():
                    await talk.send(SessionOpened(1, b"t" * 16, 60.0))
                case Ping():
                    await talk.send(Pong(message.nonce))
                case Step():
                    asyncio.get_running_loop().create_task(answer_later(talk, message))

        async def answer_later(talk: Conversation, step: Step) -> None:
            await asyncio.sleep(10.0)
            with torch.inference_mode():
                output = span_module(SECOND)(from_wire(step.hidden_states))
            await talk.send(StepReply(step.step_id, to_wire(output), 0.0, 10.0))

        slow = await add_scripted_node(s.network, compute_slowly, SECOND)
        await s.session.open(1)
        await s.add_node(SECOND)
        assert_close(await s.steps(states(1)), local_output(states(1)))
        assert slow.peer_id in in_use(s)


def answering(change: Callable[[torch.Tensor], torch.Tensor], num_right: int) -> Answer:
    """A node of the second half that computes rightly so many times."""
    left = [num_right]
    seen: list[torch.Tensor] = []

    async def answer(talk: Conversation, message: Any) -> None:
        match message:
            case OpenSession():
                await talk.send(SessionOpened(1, b"t" * 16, 60.0))
            case Step():
                seen.append(from_wire(message.hidden_states))
                with torch.inference_mode():
                    whole = span_module(SECOND)(torch.cat(seen, dim=1))
                output = whole[:, -message.hidden_states.shape[1] :]
                left[0] -= 1
                await talk.send(StepReply(message.step_id, to_wire(change(output) if left[0] < 0 else output)))

    return answer


WRONG: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "not finite": lambda output: output * float("nan"),
    "columns": lambda output: torch.cat([output, output], dim=1),
    "hidden": lambda output: output[..., :-1],
    "dtype": lambda output: output.to(torch.bfloat16),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
@virtual
async def test_a_last_node_that_starts_to_answer_wrongly_is_replaced(change: Callable[..., torch.Tensor]) -> None:
    async with scene(HALVES[0]) as s:
        bad = await add_scripted_node(s.network, answering(change, 3), SECOND)
        await s.session.open(1)
        await s.add_node(SECOND)
        assert_close(await s.steps(states(8)), local_output(states(8)))
        assert bad.peer_id not in in_use(s)


@virtual
async def test_nan_is_blamed_on_the_node_that_made_it_and_not_on_the_one_that_refuses_it() -> None:
    async with scene(SECOND) as s:
        num_right = [3]

        async def answer(talk: Conversation, message: Any) -> None:
            if isinstance(message, OpenSession):
                await talk.send(SessionOpened(1, b"t" * 16, 60.0))
            elif isinstance(message, Step):
                seen.append(from_wire(message.hidden_states))
                with torch.inference_mode():
                    output = span_module(HALVES[0])(torch.cat(seen, dim=1))[:, -1:]
                num_right[0] -= 1
                await talk.send(
                    StepReply(message.step_id, to_wire(output if num_right[0] >= 0 else output * torch.inf))
                )

        seen: list[torch.Tensor] = []
        bad = await add_scripted_node(s.network, answer, HALVES[0])
        await s.session.open(1)
        await s.add_node(HALVES[0])
        assert_close(await s.steps(states(8)), local_output(states(8)))
        assert bad.peer_id not in in_use(s)
        assert s.nodes[0].transport.peer_id in in_use(s)


@virtual
async def test_what_the_caller_did_wrong_is_blamed_on_no_node() -> None:
    async with scene(*HALVES, WHOLE) as s:
        await s.session.open(1)
        await s.steps(states(2))
        before = in_use(s)
        with pytest.raises(InvalidTensorError, match="not finite"):
            await s.steps(states(1) * float("nan"), first=2)
        assert in_use(s) == before
        assert_close(await s.steps(states(5)[:, 2:], first=2), local_output(states(5))[:, 2:])


@virtual
async def test_a_node_that_is_full_is_left_for_one_that_is_not() -> None:
    async with scene(HALVES[0]) as s:
        refusals = 0

        async def refuse_to_grow(talk: Conversation, message: Any) -> None:
            nonlocal refusals
            match message:
                case OpenSession():
                    await talk.send(SessionOpened(1, b"t" * 16, 60.0))
                case Step():
                    refusals += 1
                    await talk.send(error_reply(CacheFullError(64, 0), message.step_id))

        full = await add_scripted_node(s.network, refuse_to_grow, SECOND)
        await s.session.open(1)
        with pytest.raises(CacheFullError):  # there is no other node: the session stays and says so at once
            await s.steps(states(1))
        assert (refusals, full.peer_id in in_use(s)) == (1, True)
        await s.add_node(SECOND)
        assert_close(await s.steps(states(3)), local_output(states(3)))
        assert full.peer_id not in in_use(s)


@virtual
async def test_a_session_waits_for_blocks_that_nobody_serves_until_a_node_joins() -> None:
    async with scene(*HALVES) as s:
        await s.session.open(1)
        first = await s.steps(states(3))
        s.kill(0)
        joining = asyncio.get_running_loop().call_later(12.0, lambda: s.group.create_task(s.add_node(WHOLE)))
        started_s = now_s()
        rest = await s.steps(states(6)[:, 3:], first=3)
        assert 12.0 <= now_s() - started_s < 14.0
        assert_close(torch.cat([first, rest], dim=1), local_output(states(6)))
        joining.cancel()


@virtual
async def test_a_cancelled_recovery_is_taken_up_by_the_next_step() -> None:
    async with scene(*HALVES) as s:
        await s.session.open(1)
        first = await s.steps(states(3))
        s.kill(1)
        step = asyncio.create_task(s.steps(states(4)[:, 3:], first=3))
        await asyncio.sleep(10.0)
        step.cancel()
        await asyncio.gather(step, return_exceptions=True)
        await s.add_node(SECOND)
        rest = await s.steps(states(6)[:, 3:], first=3)
        assert_close(torch.cat([first, rest], dim=1), local_output(states(6)))


@virtual
async def test_without_room_for_its_tape_a_session_ends_as_it_did() -> None:
    async with scene(HALVES[0], HALVES[0], SECOND) as s:
        s.tapes.max_bytes = 3 * 4 * HIDDEN
        await s.session.open(1)
        await s.steps(states(4))
        assert not s.session.is_whole
        s.kill(used_index(s, HALVES[0]))
        with pytest.raises(Exception, match="lost"):
            await s.steps(states(5)[:, 4:], first=4)
        await s.session.close()
        assert s.tapes.used_bytes == 0


@virtual
async def test_without_room_for_a_tape_at_a_node_a_session_ends_and_knows_why() -> None:
    async with scene(HALVES[0], SECOND, SECOND) as s:
        s.nodes[0].tapes.max_bytes = 3 * 4 * HIDDEN
        await s.session.open(1)
        await s.steps(states(4))
        assert s.session.is_whole
        s.kill(used_index(s, SECOND))
        with pytest.raises(SwarmError, match="lost") as caught:
            await s.steps(states(5)[:, 4:], first=4)
        assert caught.value.retryable
        assert not s.session.is_whole  # so that the text is computed again


@virtual
async def test_memory_of_tapes_is_given_back() -> None:
    async with scene(HALVES[0], SECOND, SECOND) as s:
        at_first = s.nodes[0].tapes
        await s.session.open(1)
        await s.steps(states(4))
        assert s.tapes.used_bytes == at_first.used_bytes == 4 * 4 * HIDDEN
        s.kill(used_index(s, SECOND))
        await s.steps(states(5)[:, 4:], first=4)
        assert s.tapes.used_bytes == at_first.used_bytes == 5 * 4 * HIDDEN
        await s.steps(states(2)[:, 1:], first=1)  # rolls back
        assert s.tapes.used_bytes == at_first.used_bytes == 2 * 4 * HIDDEN
        await s.session.close()
        assert s.tapes.used_bytes == at_first.used_bytes == 0


def test_no_wait_means_that_the_error_comes_at_once() -> None:
    async def run() -> None:
        async with scene(*HALVES, config=replace(CONFIG, max_wait_s=0.0, resume_s=0.0)) as s:
            await s.session.open(1)
            s.kill(1)
            started_s = now_s()
            with pytest.raises(MissingBlocksError):
                await s.steps(states(1))
            assert now_s() - started_s < 1.0

    run_virtual(run())


@virtual
async def test_a_session_that_was_idle_for_too_long_is_computed_again_at_the_same_node() -> None:
    async with scene(*HALVES) as s:
        await s.session.open(1)
        first = await s.steps(states(3))
        for served in s.nodes:
            served.node.sessions.close_all()
        started_s = now_s()
        rest = await s.steps(states(6)[:, 3:], first=3)
        assert now_s() - started_s < 1.0
        assert_close(torch.cat([first, rest], dim=1), local_output(states(6)))


@virtual
async def test_a_session_that_is_closed_during_a_recovery_leaves_nothing_behind() -> None:
    async with scene(*HALVES) as s:
        await s.session.open(1)
        await s.steps(states(3))
        s.kill(1)
        step = asyncio.create_task(s.steps(states(4)[:, 3:], first=3))
        await asyncio.sleep(10.0)
        await s.session.close()
        await s.add_node(SECOND)
        with pytest.raises(SessionClosedError):
            await step
        await settle()
        assert [len(served.node.sessions) for served in s.nodes[::2]] == [0, 0]
        assert s.tapes.used_bytes == 0


@virtual
async def test_a_frozen_node_that_takes_no_more_bytes_is_found_out() -> None:
    async with scene(HALVES[0], HALVES[0], SECOND) as s:
        await s.session.open(1)
        stream = s.session._route.legs[0].stream._line.stream
        assert stream is not None

        async def send_for_ever(_: Any) -> None:
            await asyncio.sleep(1e6)

        stream.send = send_for_ever  # type: ignore[method-assign]
        started_s = now_s()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("swarm_client.node_line.WATCHED_BYTES", 1000)
            result = await s.session.step(to_wire(states(12)), 0)
        assert now_s() - started_s < NOTICE_S + 0.2
        assert_close(from_wire(result.outputs[-1]), local_output(states(12)))
