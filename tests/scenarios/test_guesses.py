"""Steps of several columns, the wrong ones of which are rolled back, while nodes die, stand by and leave."""

import asyncio
import random
from dataclasses import replace

import pytest
import torch

from swarm_client.standby import FOLLOW_TOKENS
from swarm_protocol.tensors import from_wire, to_wire
from tests.node.node_scenario import settle, states, virtual
from tests.scenarios.client_scenario import CONFIG, HALVES, Scene, local_output, scene
from tests.scenarios.test_standby import assert_close, in_use, prompt

PROMPT = 2 * FOLLOW_TOKENS
TOKENS = PROMPT + 60


async def guessed(s: Scene, text: torch.Tensor, first: int, seed: int) -> torch.Tensor:
    """Return the outputs (1, n, hidden) of the tokens of `text` from `first` on, which come with wrong ones behind."""
    rng, position, outputs = random.Random(seed), first, []
    while position < text.shape[1]:
        right = text[:, position : position + 1 + rng.randrange(5)]
        columns = torch.cat([right, states(rng.randrange(4), seed=rng.randrange(99))], dim=1)
        result = await s.session.step(to_wire(columns), position)
        outputs.append(from_wire(result.outputs[-1])[:, : right.shape[1]])
        position += right.shape[1]
        await asyncio.sleep(0.05)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("number", [0, 1])
@virtual
async def test_a_second_node_takes_over_while_tokens_are_guessed(number: int, seed: int) -> None:
    text = states(TOKENS)
    async with scene(*HALVES, *HALVES, config=replace(CONFIG, standby=True), max_length=2 * TOKENS) as s:
        await s.session.open(PROMPT)
        first = await prompt(s, PROMPT)
        await asyncio.sleep(1.0)
        old = in_use(s, number)
        second = next(served for served in s.nodes if served.worker.span == HALVES[number] and served is not old)
        rest = asyncio.create_task(guessed(s, text, PROMPT, seed))
        await asyncio.sleep(0.3 + 0.1 * seed)
        s.network.kill(old.transport.peer_id)
        assert_close(torch.cat([first, await rest], dim=1), local_output(text))
        assert in_use(s, number) is second
        assert second.worker.num_steps < TOKENS - PROMPT


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("number", [0, 1])
@virtual
async def test_a_node_leaves_while_tokens_are_guessed(number: int, seed: int) -> None:
    text = states(TOKENS)
    async with scene(*HALVES, HALVES[number], max_length=2 * TOKENS) as s:
        await s.session.open(PROMPT)
        first = await prompt(s, PROMPT)
        old = in_use(s, number)
        rest = asyncio.create_task(guessed(s, text, PROMPT, seed))
        await asyncio.sleep(0.3 + 0.1 * seed)
        old.stop.set()
        assert_close(torch.cat([first, await rest], dim=1), local_output(text))
        assert in_use(s, number) is not old
        await settle()
        assert len(old.node.sessions) == 0
