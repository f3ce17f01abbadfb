"""What a flood from one peer costs another peer's session, in the time of a device that is simulated."""

import asyncio
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from swarm_protocol.messages import COMPUTE_PROTOCOL, CloseSession, ErrorReply, SessionOpened, StepReply
from swarm_protocol.transport.memory_net import LinkProfile, MemoryTransport
from tests.node.node_scenario import (
    Conversation,
    Scenario,
    forward,
    open_session,
    serving_node,
    states,
    virtual,
)
from tests.node.timed_device import TimedWorker, forward_s

THINK_S = 0.01
"""What a client takes between two steps: its head and its sampling."""

Flood = Callable[[Scenario, MemoryTransport, int], Awaitable[None]]


@asynccontextmanager
async def timed_node() -> AsyncIterator[Scenario]:
    worker = TimedWorker()
    try:
        async with serving_node(worker) as node:
            # The link is what a volunteer's is: 5 ms and 12 MB/s.
            node.network._profile = LinkProfile(delay_s=0.005, bandwidth_bytes_per_s=12e6)
            node.node.admission.free_token_blocks += 1 << 22
            yield node
            node.node.admission.free_token_blocks -= 1 << 22
    finally:
        worker.close()


async def steps_s(talk: Conversation, first_id: int, until_s: float) -> list[float]:
    """Decode one token after the other; return what each step took."""
    loop = asyncio.get_running_loop()
    taken, step_id = [], first_id
    while loop.time() < until_s:
        started_s = loop.time()
        reply = await talk.step(step_id, (step_id - 1) % 10, states(1))
        assert isinstance(reply, StepReply), reply
        taken.append(loop.time() - started_s)
        await asyncio.sleep(THINK_S)
        step_id += 1
    return taken


async def prefills(node: Scenario, flooder: MemoryTransport, number: int) -> None:
    talk, _ = await node.open(flooder, session_id=bytes([number]) * 16, max_tokens=2000)
    for step_id in range(1, 1 << 30):
        await talk.step(step_id, 0, states(2000))


async def wide_steps(node: Scenario, flooder: MemoryTransport, number: int) -> None:
    talk, _ = await node.open(flooder, session_id=bytes([number]) * 16, batch_size=200, max_tokens=20)
    for step_id in range(1, 1 << 30):
        await talk.step(step_id, 0, states(1, rows=200))


async def forwards(node: Scenario, flooder: MemoryTransport, number: int) -> None:
    talk = await node.dial(flooder, COMPUTE_PROTOCOL)
    while True:
        await talk.ask(forward(states(768)))


async def openings(node: Scenario, flooder: MemoryTransport, number: int) -> None:
    while True:
        talk = await node.dial(flooder)
        reply = await talk.ask(open_session(session_id=bytes([number]) * 16))
        assert isinstance(reply, SessionOpened | ErrorReply)
        await talk.ask(CloseSession())
        await talk.stream.close()


async def decoding(node: Scenario, flooder: MemoryTransport, number: int) -> None:
    talk, _ = await node.open(flooder, session_id=bytes([number]) * 16)
    await steps_s(talk, 1, 1e9)


async def measured(flood: Flood, num_tasks: int) -> tuple[float, float, list[float]]:
    """Return the victim's mean time per step, alone and during a flood beyond its burst, and the burst's steps."""
    async with timed_node() as node:
        loop = asyncio.get_running_loop()
        victim, _ = await node.open(max_tokens=40)
        alone = await steps_s(victim, 1, loop.time() + 2)
        flooder = node.network.transport()
        tasks = [asyncio.create_task(flood(node, flooder, number)) for number in range(1, num_tasks + 1)]
        burst = await steps_s(victim, len(alone) + 1, loop.time() + 6)
        flooded = await steps_s(victim, len(alone) + len(burst) + 1, loop.time() + 20)
        for task in tasks:
            assert not task.done(), task.exception()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        flooder.die()
        await victim.ask(CloseSession())
        await asyncio.sleep(100)
        node.node.admission.free_token_blocks -= 1 << 22
        await node.assert_clean()
        node.node.admission.free_token_blocks += 1 << 22
        return statistics.mean(alone), statistics.mean(flooded), burst


@pytest.mark.parametrize("flood", [prefills, wide_steps, forwards, openings])
def test_a_flood_slows_another_peers_session_by_a_fifth_at_most(flood: Flood) -> None:
    @virtual
    async def scenario() -> None:
        alone_s, flooded_s, burst = await measured(flood, 8)
        assert flooded_s <= 1.2 * alone_s
        # Even before, no step waits for more than one piece of full size.
        assert max(burst) <= alone_s + forward_s(256) + 0.05

    scenario()


@virtual
async def test_many_sessions_that_decode_cost_another_peers_session_the_larger_batch_and_no_more() -> None:
    alone_s, flooded_s, _ = await measured(decoding, 16)
    # The batch has 17 rows; a step that just missed one waits for it.
    assert flooded_s <= alone_s + 2 * (forward_s(17) - forward_s(1)) + forward_s(17)


@virtual
async def test_a_prompt_of_a_newcomer_is_computed_at_full_speed_while_another_peer_floods_the_node() -> None:
    async with timed_node() as node:
        flooder = node.network.transport()
        tasks = [asyncio.create_task(prefills(node, flooder, number)) for number in range(1, 9)]
        await asyncio.sleep(20)
        victim, _ = await node.open(max_tokens=1000)
        started_s = asyncio.get_running_loop().time()
        assert isinstance(await victim.step(1, 0, states(1000)), StepReply)
        alone_s = 3 * forward_s(256) + forward_s(232)
        # One piece of the flood runs when it comes; the rest of the difference are the bytes.
        assert asyncio.get_running_loop().time() - started_s <= alone_s + forward_s(256) + 0.1
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
