"""Sessions move from nodes that leave to others while steps go on: same outputs, no prompt computed again, no pause."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server_node.compute.work import AppendWork, StepWork
from swarm_client.events import SessionEvent
from swarm_client.handover import CATCH_UP_TOKENS, LISTEN_AFTER_S
from swarm_protocol.errors import MissingBlocksError
from swarm_protocol.messages import CopySession, Draining, SessionCopied, SessionOffered
from swarm_protocol.spans import Span
from swarm_protocol.tensors import from_wire, to_wire
from swarm_protocol.transport.memory_net import LinkProfile
from swarm_protocol.transport.virtual_clock import run_virtual
from tests.node.node_scenario import HIDDEN, settle, states, virtual
from tests.scenarios.client_scenario import (
    CONFIG,
    HALVES,
    Scene,
    Served,
    local_output,
    now_s,
    scene,
)
from tests.scenarios.test_recovery import assert_close, in_use, used_index
from tests.tiny_models import NUM_BLOCKS

SECOND = HALVES[1]
SPARES = (Span(0, 2), Span(0, 1), Span(1, NUM_BLOCKS), Span(2, 4), Span(3, NUM_BLOCKS), Span(0, NUM_BLOCKS))
DRAIN_S = 60.0


async def prefilled(s: Scene, num_tokens: int) -> torch.Tensor:
    await s.session.open(num_tokens)
    (result,) = await s.session.run(lambda start, end: to_wire(states(num_tokens)[:, start:end]), num_tokens, 0)
    return from_wire(result.outputs[-1])


def leave(s: Scene, span: Span = SECOND) -> tuple[Served, list[Served]]:
    """Let the node of `span` that is in use leave; return it and the other nodes that hold the span."""
    old = s.nodes[used_index(s, span)]
    old.stop.set()
    return old, [served for served in s.nodes if served is not old and served.worker.span == span]


@virtual
async def test_a_session_moves_while_it_decodes_and_its_prompt_is_not_computed_again() -> None:
    async with scene(HALVES[0], SECOND, SECOND, max_length=200) as s:
        first = await prefilled(s, 60)
        events: list[SessionEvent] = []
        s.session.news.listener = events.append
        old, (new,) = leave(s)
        rest = await s.steps(states(70)[:, 60:], first=60)
        assert_close(torch.cat([first, rest], dim=1), local_output(states(70)))
        assert new.transport.peer_id in in_use(s)
        await asyncio.sleep(1.0)
        assert s.network.online(old.transport.peer_id) is None or len(old.node.sessions) == 0
        assert new.worker.num_tokens < 15
        assert [getattr(event, "reason", event.kind) for event in events] == ["node_leaving"]
        assert s.nodes[0].worker.num_tokens == 70


@virtual
async def test_an_idle_session_moves_as_a_whole_at_once() -> None:
    async with scene(HALVES[0], SECOND, SECOND) as s:
        first = await prefilled(s, 10)
        await asyncio.sleep(2 * LISTEN_AFTER_S)
        began_s = now_s()
        old, (new,) = leave(s)
        await settle()
        assert new.transport.peer_id in in_use(s)
        await asyncio.sleep(0.5)
        assert len(old.node.sessions) == 0
        assert now_s() - began_s < 1.0
        rest = await s.steps(states(14)[:, 10:], first=10)
        assert_close(torch.cat([first, rest], dim=1), local_output(states(14)))
        assert new.worker.num_tokens == 4


@virtual
async def test_every_node_of_a_route_may_leave_one_after_the_other() -> None:
    async with scene(*HALVES, *HALVES) as s:
        outputs = [await prefilled(s, 4)]
        for number, span in enumerate((*HALVES, *HALVES)):
            if number < 2:
                leave(s, span)
            else:
                await s.add_node(span)
                leave(s, span)
            first = 4 + 3 * number
            outputs.append(await s.steps(states(first + 3)[:, first:], first=first))
        assert_close(torch.cat(outputs, dim=1), local_output(states(16)))
        assert sum(served.worker.num_tokens for served in s.nodes) < 2 * 16 + 4 * 3


@virtual
async def test_both_nodes_of_a_route_leave_at_once() -> None:
    async with scene(*HALVES, *HALVES) as s:
        first = await prefilled(s, 6)
        for span in HALVES:
            leave(s, span)
        rest = await s.steps(states(12)[:, 6:], first=6)
        assert_close(torch.cat([first, rest], dim=1), local_output(states(12)))
        assert sum(served.worker.num_tokens for served in s.nodes) < 2 * 12 + 6


@virtual
async def test_a_rollback_during_the_copy_cuts_what_was_copied() -> None:
    async with scene(HALVES[0], SECOND, SECOND) as s:
        await prefilled(s, 10)
        await asyncio.sleep(2 * LISTEN_AFTER_S)
        _, (new,) = leave_with_slow_copies(s, 1.0)
        await settle()
        text = torch.cat([states(4), states(20, seed=7)[:, 4:14]], dim=1)
        await s.steps(text[:, 4:12], first=4)  # as many as were there, but others
        assert new.transport.peer_id not in in_use(s)
        await asyncio.sleep(2.0)
        assert_close(await s.steps(text[:, 12:], first=12), local_output(text)[:, 12:])
        assert new.transport.peer_id in in_use(s)
        assert new.worker.num_tokens == 10


@virtual
async def test_a_rollback_that_runs_when_the_node_is_asked_counts_too() -> None:
    async with scene(HALVES[0], SECOND, SECOND) as s:
        await prefilled(s, 10)
        slow_steps(s, 0.5)
        text = torch.cat([states(4), states(20, seed=7)[:, 4:14]], dim=1)
        step = asyncio.create_task(s.steps(text[:, 4:5], first=4))
        await asyncio.sleep(0.7)
        _, (new,) = leave(s)
        await step
        await asyncio.sleep(0.5)
        assert_close(await s.steps(text[:, 5:], first=5), local_output(text)[:, 5:])
        assert new.transport.peer_id in in_use(s)


@virtual
async def test_permuted_rows_are_copied_when_no_step_runs() -> None:
    async with scene(HALVES[0], SECOND, SECOND) as s:
        await s.session.close()
        s.session = s.another_session(max_length=20, batch_size=2)
        rows = states(12, rows=2)
        await s.session.open(12)
        await s.session.step(to_wire(rows[:, :8]), 0)
        await asyncio.sleep(2 * LISTEN_AFTER_S)
        _, (new,) = leave_with_slow_copies(s, 0.7)
        await settle()
        text = rows[:, :8]
        for column in range(8, 12):
            order = ((1, 0), (1, 1), None, (1, 0))[column - 8]
            text = torch.cat([text[list(order or (0, 1))], rows[:, column : column + 1]], dim=1)
            result = await s.session.step(to_wire(rows[:, column : column + 1]), column, order)
            assert_close(from_wire(result.outputs[-1]), local_output(text)[:, -1:])
            await asyncio.sleep(0.5)
        assert new.transport.peer_id in in_use(s)
        assert new.worker.num_tokens <= 2


@virtual
async def test_a_session_without_a_tape_moves_too() -> None:
    async with scene(HALVES[0], SECOND, SECOND) as s:
        s.tapes.max_bytes = s.nodes[0].tapes.max_bytes = 5 * 4 * HIDDEN
        first = await prefilled(s, 8)
        assert not s.session.is_whole
        await asyncio.sleep(2 * LISTEN_AFTER_S)
        _, (new,) = leave_with_slow_copies(s, 0.25)
        await settle()
        outputs = [first]
        for column in range(8, 14):
            outputs.append(await s.steps(states(14)[:, column : column + 1], first=column))
            await asyncio.sleep(0.4)
        assert_close(torch.cat(outputs, dim=1), local_output(states(14)))
        assert new.transport.peer_id in in_use(s)


@virtual
async def test_what_a_long_prompt_adds_meanwhile_is_copied_and_not_played() -> None:
    async with scene(HALVES[0], SECOND, SECOND, config=replace(CONFIG, step_tokens=64), max_length=300) as s:
        await s.session.open(256)
        slow_steps(s, 0.5)
        prompt = states(256)
        prefill = asyncio.create_task(s.session.run(lambda start, end: to_wire(prompt[:, start:end]), 256, 0))
        await asyncio.sleep(1.2)
        _, (new,) = leave(s)
        outputs = [from_wire(result.outputs[-1]) for result in await prefill]
        for column in range(256, 260):
            await asyncio.sleep(0.5)
            outputs.append(await s.steps(states(260)[:, column : column + 1], first=column))
        assert_close(torch.cat(outputs, dim=1), local_output(torch.cat([prompt, states(260)[:, 256:]], dim=1)))
        assert new.transport.peer_id in in_use(s)
        assert new.worker.num_tokens <= CATCH_UP_TOKENS + 4


@virtual
async def test_nodes_of_other_numerics_compute_again_when_the_time_is_over() -> None:
    async with scene(HALVES[0], SECOND, max_length=100) as s:
        first = await prefilled(s, 6)
        old, _ = leave(s)
        new = await s.add_node(SECOND, numerics="another")
        began_s, outputs = now_s(), [first]
        for column in range(6, 90):
            outputs.append(await s.steps(states(90)[:, column : column + 1], first=column))
            if new.transport.peer_id in in_use(s):
                break
            await asyncio.sleep(1.0)
        assert DRAIN_S - 1 <= now_s() - began_s < DRAIN_S + 2
        assert_close(torch.cat(outputs, dim=1), local_output(states(90)[:, : column + 1]))
        assert old.worker.num_tokens > 60


@virtual
async def test_several_shorter_spans_take_over_when_the_time_is_over() -> None:
    async with scene(HALVES[0], SECOND, max_length=100) as s:
        outputs = [await prefilled(s, 6)]
        leave(s)
        await s.add_node(Span(2, 4))
        await s.add_node(Span(4, NUM_BLOCKS))
        for column in range(6, 80):
            outputs.append(await s.steps(states(80)[:, column : column + 1], first=column))
            await asyncio.sleep(1.0)
        assert_close(torch.cat(outputs, dim=1), local_output(states(80)))
        assert [hop.span for hop in s.session.route] == [HALVES[0], Span(2, 4), Span(4, NUM_BLOCKS)]


@virtual
async def test_what_the_next_node_was_given_moves_along() -> None:
    async with scene(HALVES[0], HALVES[0], SECOND, SECOND, max_length=100) as s:
        outputs = [await prefilled(s, 30)]
        _, (new,) = leave(s, HALVES[0])
        outputs.append(await s.steps(states(40)[:, 30:], first=30))
        assert new.transport.peer_id in in_use(s)
        s.kill(used_index(s, SECOND))  # whose successor is given it again by the node that took over
        outputs.append(await s.steps(states(44)[:, 40:], first=40))
        assert_close(torch.cat(outputs, dim=1), local_output(states(44)))
        assert new.worker.num_tokens < 20


@virtual
async def test_a_node_that_joins_later_takes_over_by_a_copy() -> None:
    async with scene(HALVES[0], SECOND, max_length=100) as s:
        outputs = [await prefilled(s, 6)]
        leave(s)
        new = None
        for column in range(6, 30):
            if column == 12:
                new = await s.add_node(SECOND)
            outputs.append(await s.steps(states(30)[:, column : column + 1], first=column))
            await asyncio.sleep(0.5)
        assert new is not None
        assert new.transport.peer_id in in_use(s)
        assert new.worker.num_tokens < 24
        assert_close(torch.cat(outputs, dim=1), local_output(states(30)))


@virtual
async def test_where_nobody_has_the_blocks_the_session_ends_with_the_time_and_says_what_is_missing() -> None:
    async with scene(HALVES[0], SECOND, config=replace(CONFIG, max_wait_s=5.0), max_length=200) as s:
        await prefilled(s, 3)
        leave(s)
        began_s = now_s()

        async def go_on() -> None:
            for column in range(3, 200):
                await s.steps(states(200)[:, column : column + 1], first=column)
                await asyncio.sleep(1.0)

        with pytest.raises(MissingBlocksError):
            await go_on()
        assert DRAIN_S - 2 <= now_s() - began_s < DRAIN_S + 20.0


@pytest.mark.parametrize("when_s", [0.0, 0.05, 0.15, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("which", ["old", "new"])
@virtual
async def test_either_node_may_die_at_any_moment_of_the_move(which: str, when_s: float) -> None:
    async with scene(HALVES[0], SECOND, SECOND, SECOND) as s:
        outputs = [await prefilled(s, 8)]
        slow_links(s, delay_s=0.03)
        old, others = leave(s)
        await asyncio.sleep(0)
        killer = asyncio.create_task(kill_later(s, old, others, which, when_s))
        for column in range(8, 18):
            outputs.append(await s.steps(states(18)[:, column : column + 1], first=column))
            await asyncio.sleep(0.1)
        await killer
        assert_close(torch.cat(outputs, dim=1), local_output(states(18)))


async def kill_later(s: Scene, old: Served, others: Sequence[Served], which: str, when_s: float) -> None:
    await asyncio.sleep(when_s)
    victim = old if which == "old" else next((n for n in others if len(n.node.sessions)), others[0])
    if s.network.online(victim.transport.peer_id) is not None:
        s.network.kill(victim.transport.peer_id)


@virtual
async def test_a_session_that_is_closed_during_the_move_leaves_nothing_behind() -> None:
    for after_s in (0.01, 0.05, 0.1, 0.2, 0.4):
        async with scene(HALVES[0], SECOND, SECOND) as s:
            await prefilled(s, 8)
            slow_links(s, delay_s=0.03)
            leave(s)
            stepping = asyncio.create_task(s.steps(states(9)[:, 8:], first=8))
            await asyncio.sleep(after_s)
            await s.session.close()
            await asyncio.gather(stepping, return_exceptions=True)
            await asyncio.sleep(1.0)
            assert [len(served.node.sessions) for served in s.nodes] == [0, 0, 0]
            assert s.tapes.used_bytes == 0
            assert [t for t in asyncio.all_tasks() if t.get_name() in ("hand-over", "listening")] == []


@virtual
async def test_a_cancelled_step_does_not_harm_the_move() -> None:
    async with scene(HALVES[0], SECOND, SECOND) as s:
        first = await prefilled(s, 8)
        slow_links(s, delay_s=0.05)
        leave(s)
        for _ in range(6):
            step = asyncio.create_task(s.steps(states(9)[:, 8:], first=8))
            await asyncio.sleep(0.07)
            step.cancel()
            await asyncio.gather(step, return_exceptions=True)
        rest = await s.steps(states(14)[:, 8:], first=8)
        assert_close(torch.cat([first, rest], dim=1), local_output(states(14)))


LIES: dict[str, Callable[[Any], Any]] = {
    "more than there is": lambda copied: SessionCopied(copied.position + 1000),
    "another message": lambda _: SessionOffered(b"x" * 16),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
@virtual
async def test_a_node_that_claims_nonsense_is_passed_over(
    lie: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(HALVES[0], SECOND, SECOND, SECOND) as s:
        first = await prefilled(s, 8)
        asked = s.session._handovers._twins._ask
        liars: list[str] = []

        async def ask(peer_id: Any, request: Any, timeout_s: float) -> Any:
            answer = await asked(peer_id, request, timeout_s)
            if isinstance(request, CopySession) and (not liars or peer_id in liars):
                liars.append(peer_id)
                return lie(answer)
            return answer

        monkeypatch.setattr(s.session._handovers._twins, "_ask", ask)
        leave(s)
        rest = await s.steps(states(14)[:, 8:], first=8)
        assert_close(torch.cat([first, rest], dim=1), local_output(states(14)))
        assert liars
        assert liars[0] not in in_use(s)


@virtual
async def test_a_node_that_says_that_it_leaves_and_stays_changes_nothing() -> None:
    async with scene(HALVES[0], SECOND, SECOND) as s:
        first = await prefilled(s, 4)
        served = s.nodes[used_index(s, SECOND)]
        for session in served.node.sessions:
            assert session.link is not None
            for _ in range(3):
                session.link.post(Draining(10.0))
        outputs = [first]
        for column in range(4, 18):
            outputs.append(await s.steps(states(18)[:, column : column + 1], first=column))
            await asyncio.sleep(1.0)
        assert_close(torch.cat(outputs, dim=1), local_output(states(18)))


@virtual
async def test_steps_are_not_held_up_while_pages_move() -> None:
    async with scene(HALVES[0], SECOND, SECOND) as s:
        await prefilled(s, 8)
        old, (new,) = leave_with_slow_copies(s, 3.0)
        times = []
        for column in range(8, 18):
            began_s = now_s()
            await s.steps(states(18)[:, column : column + 1], first=column)
            times.append(now_s() - began_s)
            await asyncio.sleep(0.5)
        assert max(times) < 0.1
        assert new.transport.peer_id in in_use(s)
        assert len(old.node.sessions) == 0


def leave_with_slow_copies(s: Scene, append_s: float) -> tuple[Served, list[Served]]:
    old, others = leave(s)
    for served in others:
        run = served.worker.run

        async def slow(work: Any, run: Any = run) -> Any:
            if isinstance(work, AppendWork):
                await asyncio.sleep(append_s)
            return await run(work)

        served.worker.run = slow  # type: ignore[method-assign]
    return old, others


def slow_steps(s: Scene, step_s: float) -> None:
    """Let steps take their time at all nodes, but not keep pages waiting."""
    for served in s.nodes:
        run = served.worker.run

        async def slow(work: Any, run: Any = run) -> Any:
            if isinstance(work, StepWork):
                await asyncio.sleep(step_s)
            return await run(work)

        served.worker.run = slow  # type: ignore[method-assign]


def slow_links(s: Scene, delay_s: float) -> None:
    for one in s.nodes:
        for other in (s.client, *(served.transport for served in s.nodes)):
            if one.transport is not other:
                s.network.set_link(one.transport.peer_id, other.peer_id, LinkProfile(delay_s))


@dataclass(frozen=True)
class Fate:
    """What happens at one time: `what` to the node at `index` of those that are mortal."""

    after_s: float
    what: str
    index: int


FATES = st.lists(
    st.builds(
        Fate,
        st.floats(0.0, 2.0),
        st.sampled_from(["drain", "drain", "drain", "kill", "freeze", "break", "thaw", "leave"]),
        st.integers(0, len(SPARES) + 1),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(fates=FATES, columns=st.lists(st.integers(1, 4), min_size=3, max_size=8), rewinds=st.sets(st.integers(1, 7)))
def test_whoever_leaves_or_fails_the_outputs_are_those_of_an_undisturbed_session(
    fates: Sequence[Fate], columns: Sequence[int], rewinds: set[int]
) -> None:
    run_virtual(disturbed(fates, columns, rewinds))


async def disturbed(fates: Sequence[Fate], columns: Sequence[int], rewinds: set[int]) -> None:
    config = replace(CONFIG, max_wait_s=60.0, resume_s=3.0, step_s=10.0)
    async with scene(*HALVES, *SPARES, *HALVES, config=config, max_length=40) as s:
        slow_links(s, delay_s=0.03)
        await s.session.open(1)
        fate = asyncio.create_task(fulfil(s, fates))
        tokens = states(sum(columns))
        wanted = local_output(tokens)
        position = 0
        for number, width in enumerate(columns):
            if number in rewinds:
                position //= 2
            piece = tokens[:, position : position + width]
            result = await s.session.step(to_wire(piece), position)
            assert_close(from_wire(result.outputs[-1]), wanted[:, position : position + width])
            position += width
            await asyncio.sleep(0.1)
        await fate
        for served in s.nodes:
            s.network.thaw(served.transport.peer_id)


async def fulfil(s: Scene, fates: Sequence[Fate]) -> None:
    began_s, mortal = now_s(), s.nodes[len(HALVES) :]
    for fate in sorted(fates, key=lambda fate: fate.after_s):
        await asyncio.sleep(max(0.0, began_s + fate.after_s - now_s()))
        served = mortal[fate.index]
        peer_id = served.transport.peer_id
        if s.network.online(peer_id) is None:
            continue
        match fate.what:
            case "drain":
                served.stop.set()
            case "kill":
                s.network.kill(peer_id)
            case "freeze":
                s.network.freeze(peer_id)
            case "thaw":
                s.network.thaw(peer_id)
            case "break":
                s.network.break_streams(s.client.peer_id, peer_id)
            case "leave":
                served.node.sessions.close_all()
