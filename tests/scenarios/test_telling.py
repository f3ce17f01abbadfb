"""What a session tells while nodes come and go, on the network in memory."""

import asyncio
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from swarm_client.events import Prefilled, Recovered, RouteChanged, SessionEvent, Waiting
from swarm_protocol.errors import CacheFullError, MissingBlocksError, PeerUnreachableError
from swarm_protocol.messages import OpenSession, Step, error_reply
from swarm_protocol.spans import Span
from swarm_protocol.tensors import to_wire
from swarm_protocol.transport.memory_net import LinkProfile
from tests.node.node_scenario import Conversation, states, virtual
from tests.scenarios.client_scenario import CONFIG, HALVES, Scene, add_scripted_node, local_output, now_s, scene
from tests.scenarios.test_recovery import answering
from tests.tiny_models import NUM_BLOCKS

FIRST, SECOND = HALVES


def listening(s: Scene) -> list[SessionEvent]:
    """Note the events of the scene's session, with the time of each."""
    events: list[SessionEvent] = []
    s.session.news.listener = events.append
    return events


def kinds(events: list[SessionEvent]) -> list[str]:
    """The events' kinds and causes, repetitions once."""
    names = [getattr(event, "cause", getattr(event, "reason", event.kind)) for event in events]
    return [name for index, name in enumerate(names) if index == 0 or names[index - 1] != name]


def spans(event: SessionEvent, of: str) -> list[Span]:
    return [part.span for part in getattr(event, of)]


@virtual
async def test_a_wait_for_blocks_is_told_each_second_until_a_node_joins() -> None:
    async with scene(FIRST, SECOND) as s:
        events = listening(s)
        await s.session.open(1)
        first = await s.steps(states(4))
        s.kill(1)
        started_s = now_s()

        async def join_later() -> None:
            await asyncio.sleep(12.5)
            await s.add_node(Span(2, 3))
            await asyncio.sleep(2.0)
            await s.add_node(Span(3, NUM_BLOCKS))

        joining = asyncio.create_task(join_later())
        rest = await s.steps(states(10)[:, 4:], first=4)
        stalled_s = now_s() - started_s
        await joining
        torch.testing.assert_close(torch.cat([first, rest], dim=1), local_output(states(10)), rtol=1e-5, atol=1e-5)

    assert kinds(events) == ["opened", "no_answer", "looking", "missing_blocks", "node_lost", "recovered"]
    opened, changed = (event for event in events if isinstance(event, RouteChanged))
    assert (spans(opened, "joined"), spans(opened, "route")) == ([FIRST, SECOND], [FIRST, SECOND])
    assert spans(changed, "left") == [SECOND]
    assert spans(changed, "joined") == [Span(2, 3), Span(3, NUM_BLOCKS)]
    assert spans(changed, "route") == [FIRST, Span(2, 3), Span(3, NUM_BLOCKS)]
    missing = [event for event in events if isinstance(event, Waiting) and event.cause == "missing_blocks"]
    assert missing[0].spans == (SECOND,)
    assert missing[-1].spans == (Span(3, NUM_BLOCKS),)  # it names what is still missing
    assert missing[0].left_s == pytest.approx(CONFIG.max_wait_s, abs=1.0)
    for earlier, later in pairwise(missing):
        assert later.waited_s - earlier.waited_s == pytest.approx(1.0, abs=0.5)
        assert later.waited_s + (later.left_s or 0.0) == pytest.approx(CONFIG.max_wait_s)
    (recovered,) = (event for event in events if isinstance(event, Recovered))
    assert recovered.num_tokens == 4
    assert recovered.stall_s == pytest.approx(stalled_s, abs=0.1)


@virtual
async def test_a_wait_in_vain_ends_in_the_error_that_names_the_same_blocks() -> None:
    async with scene(FIRST, SECOND, config=replace(CONFIG, max_wait_s=5.0)) as s:
        events = listening(s)
        await s.session.open(1)
        await s.steps(states(2))
        s.kill(1)
        with pytest.raises(MissingBlocksError) as caught:
            await s.steps(states(1), first=2)
    assert kinds(events)[-1] == "missing_blocks"
    last = events[-1]
    assert isinstance(last, Waiting)
    assert last.spans == caught.value.missing == (SECOND,)
    assert sum(event.kind == "waiting" for event in events) >= 5


@virtual
async def test_the_first_route_is_waited_for_too() -> None:
    async with scene(FIRST) as s:
        events = listening(s)
        opening = asyncio.create_task(s.session.open(1))
        await asyncio.sleep(3.5)
        await s.add_node(SECOND)
        assert await opening == 0
        torch.testing.assert_close(await s.steps(states(3)), local_output(states(3)), rtol=1e-5, atol=1e-5)
    assert kinds(events) == ["missing_blocks", "opened", "recovered"]
    assert isinstance(events[0], Waiting)
    assert events[0].spans == (SECOND,)
    assert isinstance(events[-1], Recovered)
    assert events[-1].num_tokens == 0
    assert 3.5 <= events[-1].stall_s < 6.0


@virtual
async def test_the_first_route_waits_while_the_directory_names_only_a_dead_node() -> None:
    async with scene(FIRST, SECOND) as s:
        events = listening(s)
        s.kill(1)
        opening = asyncio.create_task(s.session.open(1))
        await asyncio.sleep(7.0)
        await s.add_node(SECOND)
        assert await opening == 0
        torch.testing.assert_close(await s.steps(states(3)), local_output(states(3)), rtol=1e-5, atol=1e-5)
    waits = [event for event in events if isinstance(event, Waiting)]
    assert all(event.spans == (SECOND,) for event in waits)
    assert [event.kind for event in events] == ["waiting"] * len(waits) + ["route_changed", "recovered"]


@virtual
async def test_a_first_route_over_a_dead_node_ends_when_the_time_is_over() -> None:
    async with scene(FIRST, SECOND, config=replace(CONFIG, max_wait_s=5.0)) as s:
        s.kill(1)
        started_s = now_s()
        with pytest.raises(PeerUnreachableError):
            await s.session.open(1)
        assert 4.0 <= now_s() - started_s <= 5.0 + CONFIG.open_s


@virtual
async def test_a_spare_takes_over_without_a_wait() -> None:
    async with scene(FIRST, SECOND, SECOND) as s:
        events = listening(s)
        await s.session.open(1)
        await s.steps(states(4))
        used = next(i for i, n in enumerate(s.nodes) if n.transport.peer_id == s.session.route[1].peer_id)
        s.kill(used)
        await s.steps(states(1), first=4)
    assert kinds(events) == ["opened", "looking", "node_lost", "recovered"]
    changed, recovered = events[-2:]
    assert isinstance(changed, RouteChanged)
    assert changed.left[0].peer_id == s.nodes[used].transport.peer_id
    assert changed.joined[0].peer_id == s.nodes[3 - used].transport.peer_id
    assert isinstance(recovered, Recovered)
    assert (recovered.num_tokens, recovered.stall_s < 1.0) == (4, True)


@virtual
async def test_a_silent_node_that_nobody_can_replace_is_told_once_a_second() -> None:
    async with scene(FIRST, SECOND) as s:
        events = listening(s)
        await s.session.open(1)
        await s.steps(states(2))
        s.network.freeze(s.nodes[1].transport.peer_id)
        asyncio.get_running_loop().call_later(6.0, s.network.thaw, s.nodes[1].transport.peer_id)
        await s.steps(states(3)[:, 2:], first=2)
    assert kinds(events) == ["opened", "no_answer"]
    silent = [event for event in events if isinstance(event, Waiting)]
    assert 4 <= len(silent) <= 7
    assert silent[0].spans == (SECOND,)


@virtual
async def test_the_reason_says_what_was_wrong_with_the_node() -> None:
    async with scene(FIRST) as s:
        await add_scripted_node(s.network, answering(lambda output: output * float("nan"), 2), SECOND)
        events = listening(s)
        await s.session.open(1)
        await s.add_node(SECOND)
        await s.steps(states(4))
    assert kinds(events)[-2:] == ["wrong_answer", "recovered"]


@virtual
async def test_a_full_node_is_left_and_the_wait_says_who_refused() -> None:
    async with scene(FIRST) as s:

        async def refuse(talk: Conversation, message: Any) -> None:
            match message:
                case Step():
                    await talk.send(error_reply(CacheFullError(9, 1), message.step_id))
                case OpenSession():
                    await answer(talk, message)

        answer = answering(lambda output: output, 0)
        await add_scripted_node(s.network, refuse, SECOND)
        events = listening(s)
        await s.session.open(1)
        await s.add_node(SECOND)
        await s.steps(states(1))
    assert kinds(events) == ["opened", "looking", "node_full", "recovered"]


@virtual
async def test_an_undisturbed_session_tells_its_route_and_nothing_more() -> None:
    async with scene(FIRST, SECOND) as s:
        for served in s.nodes:
            s.network.set_link(s.client.peer_id, served.transport.peer_id, LinkProfile(0.1))
        events = listening(s)
        await s.session.open(1)
        await s.steps(states(8))
    assert kinds(events) == ["opened"]


@virtual
async def test_a_long_prompt_tells_how_much_of_it_is_computed() -> None:
    async with scene(FIRST, SECOND, config=replace(CONFIG, step_tokens=64), max_length=300) as s:
        events = listening(s)
        await s.session.open(1)
        await s.session.run(lambda start, end: to_wire(states(250)[:, start:end]), 40, 0)
        assert not [event for event in events if isinstance(event, Prefilled)]
        await s.session.run(lambda start, end: to_wire(states(250)[:, 40 + start : 40 + end]), 210, 40)
        told = [event for event in events if isinstance(event, Prefilled)]
        assert len(told) >= 2
        assert {event.total for event in told} == {250}
        assert [event.done for event in told] == sorted({event.done for event in told})
        assert told[0].done > 40
        assert told[-1].done < 250
