"""Whatever fails, and whenever: hypothesis chooses, and the outputs are those of an undisturbed session.

Two nodes that nothing happens to always cover the blocks, but they are far away, so that a route prefers the others.
Those are killed, frozen, cut off, restarted, drained and made to forget, alone or two neighbours at once, in the middle
of a prompt or of a token, and others join. `UMBEL_SCHEDULES=5000` runs so many schedules instead of some.
"""

import asyncio
import os
import random
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server_node.compute.work import StepWork, Work
from swarm_client.recovery import MAX_WRONG_ANSWERS
from swarm_protocol.messages import WireTensor
from swarm_protocol.spans import Span
from swarm_protocol.tensors import from_wire, to_wire
from swarm_protocol.transport.memory_net import LinkProfile
from swarm_protocol.transport.virtual_clock import run_virtual
from tests.node.node_scenario import states, virtual
from tests.scenarios.client_scenario import CONFIG, HALVES, WHOLE, Scene, Served, local_output, now_s, scene, start_node
from tests.tiny_models import NUM_BLOCKS

NUM_SCHEDULES = int(os.environ.get("UMBEL_SCHEDULES", "60"))
SPARES = (Span(0, 2), Span(0, 1), Span(1, NUM_BLOCKS), Span(2, 4), Span(3, NUM_BLOCKS), WHOLE)
FAR, NEAR, NEARER = LinkProfile(0.05), LinkProfile(0.03), LinkProfile(0.015)
PROMPTS = (1, 3, 40, 260)
"""The last one goes through the route in pieces, several at once."""
SETTINGS = replace(CONFIG, max_wait_s=60.0, resume_s=3.0, step_s=10.0)

WRONG: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "not finite": lambda output: output * float("nan"),
    "columns": lambda output: torch.cat([output, output], dim=1),
    "hidden": lambda output: output[..., :-1],
    "dtype": lambda output: output.to(torch.bfloat16),
}
HAPPENINGS = ("kill", "freeze", "thaw", "break", "cut", "cut between nodes", "restart", "drain", "forget", "join")


@dataclass(frozen=True)
class Fate:
    """What happens at one time: `what` to `num` neighbours of the route from hop `index` on, or to another node."""

    after_s: float
    what: str
    index: int
    num: int
    is_in_route: bool


FATES = st.lists(
    st.builds(
        Fate,
        st.floats(0.0, 1.5),
        st.sampled_from([*HAPPENINGS, *WRONG]),
        st.integers(0, 5),
        st.sampled_from((1, 1, 2)),
        st.sampled_from((True, True, False)),
    ),
    max_size=6,
)


@dataclass
class Mortals:
    """The nodes to which things happen, and the hands to do it."""

    s: Scene
    immortal: frozenset[str]
    served: list[Served] = field(default_factory=list)
    num_starts: int = 1
    num_spoilt: int = 0

    async def add(self, span: Span, transport: Any = None) -> None:
        """Start a node; with a transport, one that was there before."""
        self.num_starts += 1
        served = await start_node(self.s.network, span, self.s.group, transport=transport, incarnation=self.num_starts)
        self.s.nodes.append(served)
        self.served.append(served)
        peer_id = served.transport.peer_id
        self.s.network.set_link(self.s.client.peer_id, peer_id, NEAR if span == WHOLE else NEARER)

    async def fulfil(self, fates: Sequence[Fate]) -> None:
        """Let everything happen in its time."""
        began_s = now_s()
        for fate in sorted(fates, key=lambda fate: fate.after_s):
            await asyncio.sleep(max(0.0, began_s + fate.after_s - now_s()))
            if fate.what == "join":
                await self.add(SPARES[fate.index])
                continue
            for served in self._struck(fate):
                await self._strike(served, fate.what)

    def _struck(self, fate: Fate) -> list[Served]:
        alive = [each for each in self.served if self.s.network.online(each.transport.peer_id) is each.transport]
        if fate.is_in_route:
            route = [hop.peer_id for hop in self.s.session.route]
            alive = sorted(
                (each for each in alive if each.transport.peer_id in route),
                key=lambda each: route.index(each.transport.peer_id),
            )
        return [alive[(fate.index + number) % len(alive)] for number in range(min(fate.num, len(alive)))]

    async def _strike(self, served: Served, what: str) -> None:
        network, client, peer_id = self.s.network, self.s.client.peer_id, served.transport.peer_id
        others = [hop.peer_id for hop in self.s.session.route if hop.peer_id != peer_id]
        match what:
            case "kill":
                network.kill(peer_id)
            case "freeze":
                network.freeze(peer_id)
            case "thaw":
                network.thaw(peer_id)
            case "break":
                for other in (client, *others):
                    network.break_streams(other, peer_id)
            case "cut":
                network.cut(client, peer_id)
            case "cut between nodes":
                for other in others:
                    network.cut(other, peer_id)
            case "restart":
                await self.add(served.worker.span, network.restart(peer_id))
            case "drain":
                served.stop.set()
            case "forget":
                served.node.sessions.close_all()
            case what if what in WRONG and self.num_spoilt < MAX_WRONG_ANSWERS - 1:
                self.num_spoilt += 1  # more in one step would be taken for the session's own fault
                spoil(served, WRONG[what])

    def end(self) -> None:
        """Let those that are left go."""
        for served in self.served:
            self.s.network.thaw(served.transport.peer_id)
        for served in self.served:
            served.stop.set()


def spoil(served: Served, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Let a node answer wrongly from now on."""
    compute = served.worker.run

    async def run(work: Work) -> Any:
        result = await compute(work)
        if isinstance(work, StepWork):
            return replace(result, hidden_states=to_wire(change(from_wire(result.hidden_states))))
        return result

    served.worker.run = run  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize(
    "change",
    WRONG.values(),
    ids=WRONG.keys(),
)
@virtual
async def test_a_first_node_that_starts_to_answer_wrongly_is_replaced_and_not_the_one_behind(
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    async with scene(*HALVES) as s:
        await s.session.open(1)
        first = await s.steps(states(4))
        await s.add_node(HALVES[0])
        spoil(s.nodes[0], change)
        rest = await s.steps(states(8)[:, 4:], first=4)
        torch.testing.assert_close(torch.cat([first, rest], dim=1), local_output(states(8)), rtol=1e-5, atol=1e-5)
        assert [hop.peer_id for hop in s.session.route] == [s.nodes[2].transport.peer_id, s.nodes[1].transport.peer_id]


@settings(max_examples=NUM_SCHEDULES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    fates=FATES,
    prompt=st.sampled_from(PROMPTS),
    columns=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    rewinds=st.sets(st.integers(1, 4)),
)
@pytest.mark.timeout(0 if NUM_SCHEDULES > 1000 else 300)
def test_whatever_fails_the_outputs_are_those_of_an_undisturbed_session(
    fates: Sequence[Fate], prompt: int, columns: Sequence[int], rewinds: set[int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secrets, "choice", random.Random(0).choice)  # routes that are equally good are drawn
        run_virtual(disturbed(fates, prompt, columns, rewinds))


async def disturbed(fates: Sequence[Fate], prompt: int, columns: Sequence[int], rewinds: set[int]) -> None:
    tokens = states(prompt + sum(columns))
    wanted = local_output(tokens)
    async with scene(*HALVES, config=SETTINGS, max_length=tokens.shape[1]) as s:
        mortals = Mortals(s, frozenset(served.transport.peer_id for served in s.nodes))
        for peer_id in mortals.immortal:
            s.network.set_link(s.client.peer_id, peer_id, FAR)
        for span in SPARES:
            await mortals.add(span)
        await s.session.open(1)
        happening = asyncio.create_task(mortals.fulfil(fates))
        try:
            position = await write(s, tokens, 0, prompt, wanted)
            for number, width in enumerate(columns):
                if number in rewinds:
                    position //= 2
                position = await write(s, tokens, position, position + width, wanted)
                await asyncio.sleep(0.1)
            await happening
        finally:
            happening.cancel()
            mortals.end()


async def write(s: Scene, tokens: torch.Tensor, start: int, end: int, wanted: torch.Tensor) -> int:
    """Run the tokens from `start` to `end` and look at what comes; returns `end`."""

    def cut(first: int, last: int) -> WireTensor:
        return to_wire(tokens[:, start + first : start + last])

    results = await s.session.run(cut, end - start, start)
    found = torch.cat([from_wire(result.outputs[-1]) for result in results], dim=1)
    torch.testing.assert_close(found, wanted[:, start:end], rtol=1e-5, atol=1e-5)
    return end
