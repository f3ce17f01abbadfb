"""A second node follows along at each hop and takes over with what it has."""

import asyncio
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm_client.node_line import NOTICE_S
from swarm_client.standby import FOLLOW_TOKENS
from swarm_protocol.tensors import from_wire, to_wire
from swarm_protocol.transport.memory_net import LinkProfile
from swarm_protocol.transport.virtual_clock import run_virtual
from tests.node.node_scenario import settle, states, virtual
from tests.scenarios.client_scenario import CONFIG, HALVES, Scene, Served, local_output, now_s, scene

STANDBY = replace(CONFIG, standby=True)
TOKENS = 3 * FOLLOW_TOKENS


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def in_use(s: Scene, number: int) -> Served:
    """The node that the session uses at one of its hops."""
    return next(served for served in s.nodes if served.transport.peer_id == s.session.route[number].peer_id)


async def prompt(s: Scene, num_tokens: int) -> torch.Tensor:
    result = await s.session.step(to_wire(states(num_tokens)), 0)
    return from_wire(result.outputs[-1])


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("what", ["kill", "freeze"])
@virtual
async def test_a_second_node_goes_on_with_what_was_copied(what: str, number: int) -> None:
    async with scene(*HALVES, *HALVES, config=STANDBY, max_length=2 * TOKENS) as s:
        await s.session.open(TOKENS)
        first = await prompt(s, TOKENS)
        await asyncio.sleep(1.0)
        old = in_use(s, number)
        second = next(served for served in s.nodes if served.worker.span == old.worker.span and served is not old)
        assert len(second.node.sessions) == 1
        assert second.worker.num_steps == 0
        getattr(s.network, what)(old.transport.peer_id)
        started_s = now_s()
        rest = await s.steps(states(TOKENS + 3)[:, TOKENS:], first=TOKENS)
        assert now_s() - started_s < NOTICE_S + 0.2
        assert_close(torch.cat([first, rest], dim=1), local_output(states(TOKENS + 3)))
        assert in_use(s, number) is second
        assert second.worker.num_steps == 3  # nothing was played
        s.network.thaw(old.transport.peer_id)


@virtual
async def test_only_what_was_not_copied_yet_is_played() -> None:
    async with scene(*HALVES, HALVES[1], config=STANDBY, max_length=2 * TOKENS) as s:
        await s.session.open(TOKENS)
        first = await prompt(s, TOKENS)
        await asyncio.sleep(1.0)
        text, position = states(TOKENS + 20), TOKENS
        more = await s.steps(text[:, position : position + 10], first=position)
        old = in_use(s, 1)
        second = next(n for n in s.nodes if n.worker.span == HALVES[1] and n is not old)
        s.network.kill(old.transport.peer_id)
        rest = await s.steps(text[:, position + 10 :], first=position + 10)
        assert_close(torch.cat([first, more, rest], dim=1), local_output(text))
        assert second.worker.num_steps == 1 + 10


@virtual
async def test_what_is_behind_a_roll_back_is_copied_again() -> None:
    async with scene(*HALVES, HALVES[1], config=STANDBY, max_length=2 * TOKENS) as s:
        await s.session.open(TOKENS)
        await prompt(s, TOKENS)
        await asyncio.sleep(1.0)
        other = torch.cat([states(TOKENS)[:, :20], states(TOKENS, seed=7)[:, 20:]], dim=1)
        result = await s.session.step(to_wire(other[:, 20:]), 20)
        assert_close(from_wire(result.outputs[-1]), local_output(other)[:, 20:])
        s.network.kill(in_use(s, 1).transport.peer_id)
        whole = torch.cat([other, states(2, seed=8)], dim=1)
        rest = await s.steps(whole[:, TOKENS:], first=TOKENS)
        assert_close(rest, local_output(whole)[:, TOKENS:])


@virtual
async def test_a_node_that_stands_by_and_dies_is_replaced_and_nothing_is_left() -> None:
    async with scene(*HALVES, HALVES[1], HALVES[1], config=STANDBY, max_length=2 * TOKENS) as s:
        await s.session.open(TOKENS)
        first = await prompt(s, TOKENS)
        await asyncio.sleep(1.0)
        used = in_use(s, 1)
        second = next(n for n in s.nodes if n.worker.span == HALVES[1] and n is not used and len(n.node.sessions))
        s.network.kill(second.transport.peer_id)
        text = states(2 * TOKENS)
        more = await s.steps(text[:, TOKENS : TOKENS + FOLLOW_TOKENS + 1], first=TOKENS)
        await asyncio.sleep(30.0)
        third = next(n for n in s.nodes if n.worker.span == HALVES[1] and n not in (used, second))
        assert len(third.node.sessions) == 1
        assert_close(torch.cat([first, more], dim=1), local_output(text[:, : TOKENS + FOLLOW_TOKENS + 1]))
        await s.session.close()
        await settle()
        assert [len(served.node.sessions) for served in (s.nodes[0], used, third)] == [0, 0, 0]
        assert not [task for task in asyncio.all_tasks() if task.get_name() == "standby"]


@settings(max_examples=40, deadline=None)
@given(
    kills=st.lists(st.tuples(st.floats(0.0, 3.0), st.integers(0, 3)), max_size=3),
    pieces=st.lists(st.tuples(st.integers(1, 50), st.floats(0.2, 1.0), st.floats(0.0, 0.3)), min_size=2, max_size=8),
)
def test_whatever_dies_the_outputs_are_right(
    kills: list[tuple[float, int]], pieces: list[tuple[int, float, float]]
) -> None:
    async def disturbed() -> None:
        length = sum(width for width, _, _ in pieces)
        # The first two stay; the others, which are preferred, die.
        async with scene(*HALVES, *HALVES, *HALVES, config=STANDBY, max_length=length) as s:
            for served in s.nodes:
                s.network.set_link(s.client.peer_id, served.transport.peer_id, LinkProfile(0.02))
            for served in s.nodes[:2]:
                s.network.set_link(s.client.peer_id, served.transport.peer_id, LinkProfile(0.05))
            await s.session.open(1)
            loop = asyncio.get_running_loop()
            for after_s, index in kills:
                loop.call_later(after_s, s.network.kill, s.nodes[2 + index].transport.peer_id)
            text, end = states(length), 0
            for number, (width, back, pause_s) in enumerate(pieces):
                position = int(end * back) if number % 3 == 2 else end
                text[:, position:] = states(length, seed=number)[:, position:]
                piece = text[:, position : position + width]
                result = await s.session.step(to_wire(piece), position)
                wanted = local_output(text[:, : position + width])[:, position:]
                assert_close(from_wire(result.outputs[-1]), wanted)
                end = position + width
                await asyncio.sleep(pause_s)

    run_virtual(disturbed())
