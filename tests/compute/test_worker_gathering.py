"""The device thread holds decode steps for sessions that are on their way back, and starts as soon as they are here."""

import asyncio
import time

import pytest

from server_node.compute.kv_cache import KVCache
from server_node.compute.worker import ComputeWorker
from tests.compute.test_worker import Recorded, open_caches, states, step

BATCH_S = 0.08
"""What a forward takes here: holds are a share of it, so a busy machine has some room."""


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    recorded = Recorded(monkeypatch)
    recorded.hook = lambda: time.sleep(BATCH_S)
    return recorded


async def opened(recorded: Recorded, num_sessions: int) -> tuple[ComputeWorker, list[KVCache]]:
    """A worker that knows how steps are joined, and empty sessions."""
    recorded.hook, hook = lambda: None, recorded.hook
    worker = recorded.worker()
    caches = await open_caches(worker, num_sessions)
    await asyncio.gather(*(worker.run(step(cache, states(1), 0)) for cache in caches))
    recorded.hook = hook
    recorded.forwards.clear()
    return worker, caches


async def decode(worker: ComputeWorker, cache: KVCache, num_steps: int, away_s: float) -> list[float]:
    """A client that takes so long for its head. Returns how long each of its steps waited at the node."""
    waited_s = []
    for position in range(1, 1 + num_steps):
        output = await worker.run(step(cache, states(1, position), position))
        waited_s.append(output.queue_s)
        await asyncio.sleep(away_s)
    return waited_s


async def test_sessions_that_fell_apart_come_together_again(recorded: Recorded) -> None:
    worker, caches = await opened(recorded, 4)

    async def join(number: int) -> None:
        await asyncio.sleep(BATCH_S / 2 if number else 0)  # the first one runs by itself, the others after it
        await decode(worker, caches[number], 8, 0.008)

    await asyncio.gather(*(join(number) for number in range(4)))
    worker.close()
    rows = [rows for rows, _, _ in recorded.forwards]
    assert rows[0] == 1
    assert rows.count(4) >= 5


async def test_a_session_alone_is_not_held_for_one_that_ended(recorded: Recorded) -> None:
    worker, caches = await opened(recorded, 2)
    await asyncio.gather(*(decode(worker, cache, 4, 0.004) for cache in caches))
    await decode(worker, caches[0], 1, 0.0)  # may be held once for the other
    waited_s = await decode(worker, caches[0], 5, 0.0)
    worker.close()
    assert sorted(waited_s)[2] < 0.01


async def test_a_session_with_a_long_way_back_makes_nobody_wait(recorded: Recorded) -> None:
    worker, caches = await opened(recorded, 2)
    far = asyncio.create_task(decode(worker, caches[1], 3, 4 * BATCH_S))
    waited_s = await decode(worker, caches[0], 12, 0.004)
    await far
    worker.close()
    # Only behind a step of the other one that runs already; with a hold, each would wait at least a quarter of it.
    assert sorted(waited_s)[6] < BATCH_S / 8


async def test_a_prefill_that_comes_ends_a_hold(recorded: Recorded) -> None:
    worker, caches = await opened(recorded, 3)
    await asyncio.gather(*(decode(worker, cache, 4, 0.025) for cache in caches[:2]))
    outputs = await asyncio.gather(*(worker.run(step(cache, states(1, 5), 5)) for cache in caches[:2]))
    assert all(outputs)
    held = asyncio.create_task(worker.run(step(caches[0], states(1, 6), 6)))
    await asyncio.sleep(0.002)
    assert worker._held is not None
    prefill = asyncio.create_task(worker.run(step(caches[2], states(3), 1)))
    await asyncio.sleep(0.002)
    assert worker._held is None
    await asyncio.gather(held, prefill)
    worker.close()


async def test_closing_during_a_hold_drops_what_waits(recorded: Recorded) -> None:
    worker, caches = await opened(recorded, 2)
    await asyncio.gather(*(decode(worker, cache, 4, 0.025) for cache in caches))
    await asyncio.gather(*(worker.run(step(cache, states(1, 5), 5)) for cache in caches))
    num_forwards = len(recorded.forwards)
    held = asyncio.create_task(worker.run(step(caches[0], states(1, 6), 6)))
    await asyncio.sleep(0.002)
    assert worker._held is not None
    worker.close()
    await asyncio.wait([held])
    assert held.cancelled()
    await asyncio.sleep(2 * BATCH_S)
    assert len(recorded.forwards) == num_forwards


async def test_a_step_that_is_withdrawn_during_a_hold_is_not_run(recorded: Recorded) -> None:
    worker, caches = await opened(recorded, 2)
    await asyncio.gather(*(decode(worker, cache, 4, 0.025) for cache in caches))
    await asyncio.gather(*(worker.run(step(cache, states(1, 5), 5)) for cache in caches))
    num_forwards = len(recorded.forwards)
    held = asyncio.create_task(worker.run(step(caches[0], states(1, 6), 6)))
    await asyncio.sleep(0.002)
    held.cancel()
    await asyncio.wait([held])
    await asyncio.sleep(2 * BATCH_S)
    assert len(recorded.forwards) == num_forwards
    await worker.run(step(caches[1], states(1, 6), 6))
    worker.close()
