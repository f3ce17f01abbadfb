"""The device thread holds decode steps for sessions that are on their way back, and starts as soon as they are here."""

import asyncio
import time
from collections.abc import Callable, Hashable, Mapping

import pytest

from server_node.compute.gathering import Gathering
from server_node.compute.kv_cache import KVCache
from server_node.compute.work import Computed
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


async def decode(worker: ComputeWorker, cache: KVCache, num_steps: int, away_s: float) -> None:
    """A client that takes so long for its head."""
    for position in range(1, 1 + num_steps):
        await worker.run(step(cache, states(1, position), position))
        await asyncio.sleep(away_s)


async def test_sessions_that_fell_apart_come_together_again(recorded: Recorded) -> None:
    worker, caches = await opened(recorded, 4)

    async def join(number: int) -> None:
        await asyncio.sleep(BATCH_S / 2 if number else 0)  # the first one runs by itself, the others after it
        await decode(worker, caches[number], 8, 0.008)

    await asyncio.gather(*(join(number) for number in range(4)))
    worker.close()
    rows = [rows for rows, _, _ in recorded.forwards]
    assert rows[0] == 1
    assert rows.count(4) >= 3


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    pytest.fail("it never came to that")


class LongHold(Gathering):
    """Holds what waits until something else ends the hold."""

    def hold_s(self, waiting: Mapping[Hashable, float], now_s: float) -> float:
        return 60.0


async def held_step(recorded: Recorded) -> tuple[ComputeWorker, list[KVCache], "asyncio.Task[Computed]"]:
    """A worker that holds a step of the first of two sessions."""
    recorded.hook = lambda: None
    worker, caches = await opened(recorded, 2)
    worker._gathering = LongHold()
    held = asyncio.create_task(worker.run(step(caches[0], states(1, 1), 1)))
    await until(lambda: worker._held is not None)
    return worker, caches, held


async def test_the_last_one_who_comes_ends_a_hold(recorded: Recorded) -> None:
    worker, caches, held = await held_step(recorded)
    worker._gathering = Gathering()  # which expects nobody
    await asyncio.gather(held, worker.run(step(caches[1], states(1, 2), 1)))
    worker.close()
    assert recorded.forwards == [(2, 1, 3)]


async def test_a_prefill_that_comes_ends_a_hold(recorded: Recorded) -> None:
    worker, caches, held = await held_step(recorded)
    # If the prefill is the first to run, the step behind it is not to be held again.
    recorded.hook = lambda: setattr(worker, "_gathering", Gathering())
    await asyncio.gather(held, worker.run(step(caches[1], states(3), 1)))
    worker.close()
    assert sorted(recorded.forwards) == [(1, 1, 3), (1, 3, 3)]


async def test_a_hold_between_two_batches_ends_too(recorded: Recorded) -> None:
    worker, caches = await opened(recorded, 2)
    first = asyncio.create_task(worker.run(step(caches[0], states(1, 1), 1)))
    await until(lambda: bool(recorded.forwards))
    worker._gathering = LongHold()
    second = asyncio.create_task(worker.run(step(caches[1], states(1, 2), 1)))  # waits behind the first
    await first
    await until(lambda: worker._held is not None)
    worker._gathering = Gathering()
    await asyncio.gather(second, worker.run(step(caches[0], states(1, 3), 2)))
    worker.close()
    assert recorded.forwards == [(1, 1, 3), (2, 1, 3)]


async def test_closing_during_a_hold_drops_what_waits(recorded: Recorded) -> None:
    worker, _, held = await held_step(recorded)
    worker.close()
    await asyncio.wait([held])
    assert held.cancelled()
    assert not recorded.forwards


async def test_a_step_that_is_withdrawn_during_a_hold_is_not_run(recorded: Recorded) -> None:
    worker, caches, held = await held_step(recorded)
    held.cancel()
    await asyncio.wait([held])
    worker._gathering = Gathering()
    await worker.run(step(caches[1], states(1, 2), 1))
    worker.close()
    assert recorded.forwards == [(1, 1, 3)]
