"""The device thread joins what sessions submit, cuts what is long, and drops what nobody waits for."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import replace
from typing import Any

import pytest
import torch

from server_node.compute.block_runner import BlockRunner
from server_node.compute.device_shares import ShareLimits
from server_node.compute.kv_cache import KVCache
from server_node.compute.scheduler import BatchLimits, Kind
from server_node.compute.work import AllocateWork, ForwardWork, StepWork
from server_node.compute.work_runner import Job, WorkRunner
from server_node.compute.worker import ComputeWorker
from swarm_protocol.errors import InvalidTensorError, LimitExceededError, MaxLengthError
from swarm_protocol.ids import PeerId
from swarm_protocol.tensors import from_wire, to_wire
from tests.node.node_scenario import HIDDEN, SPAN, tiny_span

LIMITS = BatchLimits(chunk_tokens=4)
PEER, OTHER = PeerId("a peer"), PeerId("another")


class Recorded:
    """A runner whose forwards are noted: rows, tokens, blocks. `hook` is called before each of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runner = BlockRunner(tiny_span())
        self.forwards: list[tuple[int, int, int]] = []
        self.hook: Callable[[], None] = lambda: None
        original = self.runner.module.forward

        def forward(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            self.forwards.append((*hidden_states.shape[:2], len(kwargs["blocks"])))
            self.hook()
            return original(hidden_states, **kwargs)

        monkeypatch.setattr(self.runner.module, "forward", forward)

    def worker(self, executor: Executor | None = None, **options: Any) -> ComputeWorker:
        worker = ComputeWorker(executor, runner=self.runner, limits=LIMITS, **options)
        assert worker._runner is not None
        _ = worker._runner.batches.joining  # probed now, not among what is counted
        self.forwards.clear()
        return worker


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return Recorded(monkeypatch)


def states(num_tokens: int, seed: int = 0, num_rows: int = 1) -> torch.Tensor:
    return torch.randn(num_rows, num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def step(cache: KVCache, hidden_states: torch.Tensor, position: int) -> StepWork:
    return StepWork(cache, SPAN, position, to_wire(hidden_states))


async def open_caches(worker: ComputeWorker, count: int, max_tokens: int = 40) -> list[KVCache]:
    return [await worker.run(AllocateWork(SPAN, 1, max_tokens)) for _ in range(count)]


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert ((found - wanted).abs().max() / wanted.abs().max()).item() <= 1e-5


class ManualExecutor(Executor):
    """Runs nothing before it is told to, and then in a thread of its own."""

    def __init__(self) -> None:
        self.submitted: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        self.submitted.append((future, lambda: fn(*args, **kwargs)))
        return future

    def go(self) -> None:
        while self.submitted:
            future, call = self.submitted.pop(0)
            thread = threading.Thread(target=lambda future=future, call=call: future.set_result(call()))
            thread.start()
            thread.join(60)


async def test_concurrent_sessions_share_forwards(recorded: Recorded) -> None:
    worker = recorded.worker()
    caches = await open_caches(worker, 8)
    prompts = [states(1 + number % 4, number) for number in range(8)]

    async def decode(number: int) -> torch.Tensor:
        outputs = [await worker.run(step(caches[number], prompts[number], 0))]
        for at in range(10):
            position = prompts[number].shape[1] + at
            outputs.append(await worker.run(step(caches[number], states(1, 100 * number + at), position)))
        return torch.cat([from_wire(output.hidden_states) for output in outputs], dim=1)

    found = await asyncio.gather(*(decode(number) for number in range(8)))
    worker.close()
    # 80 decode steps, and 8 prompts of which 6 are prefills.
    assert len(recorded.forwards) <= 45
    for number, output in enumerate(found):
        whole = torch.cat([prompts[number], *(states(1, 100 * number + at) for at in range(10))], dim=1)
        assert_same(output, recorded.runner.forward(whole, SPAN))


async def test_a_prefill_is_cut_and_decode_steps_run_in_between(recorded: Recorded) -> None:
    executor = ManualExecutor()
    worker = recorded.worker(executor)
    long, short = recorded.runner.new_cache(1, 40), recorded.runner.new_cache(1, 40)
    prefill = asyncio.create_task(worker.run(step(long, states(11), 0)))
    decode = asyncio.create_task(worker.run(step(short, states(1), 0)))
    await asyncio.sleep(0.01)
    executor.go()
    output = await prefill
    await decode
    assert recorded.forwards == [(1, 4, 3), (1, 1, 3), (1, 4, 3), (1, 3, 3)]
    assert_same(from_wire(output.hidden_states), recorded.runner.forward(states(11), SPAN))
    assert output.queue_s >= 0 < output.compute_s
    assert long.position == 11


async def test_a_forward_is_cut_by_blocks(recorded: Recorded) -> None:
    worker = recorded.worker()
    output = await worker.run(ForwardWork(SPAN, to_wire(states(6))))
    worker.close()
    assert recorded.forwards == [(1, 6, 2), (1, 6, 1)]
    assert_same(from_wire(output.hidden_states), recorded.runner.forward(states(6), SPAN))


async def test_values_that_are_not_finite_fail_one_session_only(recorded: Recorded) -> None:
    worker = recorded.worker()
    caches = await open_caches(worker, 3)
    inputs = [states(1, number) for number in range(3)]
    inputs[1][0, 0, 5] = float("nan")
    works = (worker.run(step(cache, each, 0)) for cache, each in zip(caches, inputs, strict=True))
    results = await asyncio.gather(*works, return_exceptions=True)
    worker.close()
    assert isinstance(results[1], InvalidTensorError)
    assert recorded.forwards == [(2, 1, 3)]
    assert [cache.position for cache in caches] == [1, 0, 1]


async def test_a_prefill_that_fails_in_a_later_piece_leaves_nothing_behind(recorded: Recorded) -> None:
    worker = recorded.worker()
    (cache,) = await open_caches(worker, 1)
    await worker.run(step(cache, states(3), 0))

    def fail() -> None:
        if len(recorded.forwards) == 3:
            raise MemoryError("no more")

    recorded.hook = fail
    with pytest.raises(MemoryError):
        await worker.run(step(cache, states(9), 3))
    assert cache.position == 3
    with pytest.raises(MaxLengthError):
        await worker.run(step(cache, states(38), 3))
    assert len(recorded.forwards) == 3
    worker.close()


async def test_cancelled_work_leaves_the_queue(recorded: Recorded) -> None:
    executor = ManualExecutor()
    worker = recorded.worker(executor, max_queued=2)
    caches = [recorded.runner.new_cache(1, 40) for _ in range(3)]
    tasks = [asyncio.create_task(worker.run(step(cache, states(1), 0))) for cache in caches[:2]]
    await asyncio.sleep(0.01)
    with pytest.raises(LimitExceededError):
        await worker.run(step(caches[2], states(1), 0))
    tasks[0].cancel()
    await asyncio.wait([tasks[0]])
    tasks.append(asyncio.create_task(worker.run(step(caches[2], states(1), 0))))
    await asyncio.sleep(0.01)
    executor.go()
    await asyncio.gather(*tasks[1:])
    assert recorded.forwards == [(2, 1, 3)]
    assert [cache.position for cache in caches] == [0, 1, 1]


async def test_a_prefill_that_is_cancelled_stops_at_its_next_piece(recorded: Recorded) -> None:
    loop = asyncio.get_running_loop()
    worker = recorded.worker()
    (cache,) = await open_caches(worker, 1)
    await worker.run(step(cache, states(2), 0))
    task = asyncio.create_task(worker.run(step(cache, states(30), 2)))
    cancelled = threading.Event()

    def cancel() -> None:
        task.cancel()
        loop.call_soon(loop.call_soon, cancelled.set)

    def hook() -> None:
        if len(recorded.forwards) == 3:
            loop.call_soon_threadsafe(cancel)
            assert cancelled.wait(10)

    recorded.hook = hook
    await asyncio.wait([task])
    recorded.hook = lambda: None
    # What comes next finds the cache as it was before.
    await worker.run(step(cache, states(1), 2))
    worker.close()
    assert task.cancelled()
    assert recorded.forwards == [(1, 2, 3), (1, 4, 3), (1, 4, 3), (1, 1, 3)]
    assert cache.position == 3


async def test_closing_drops_what_waits(recorded: Recorded) -> None:
    executor = ManualExecutor()
    worker = recorded.worker(executor)
    task = asyncio.create_task(worker.run(step(recorded.runner.new_cache(1, 9), states(1), 0)))
    await asyncio.sleep(0.01)
    worker.close()
    await asyncio.wait([task])
    assert task.cancelled()
    executor.go()
    await asyncio.sleep(0.01)
    assert not recorded.forwards


async def test_a_bug_of_the_device_thread_reaches_everybody_who_waits(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = recorded.worker()
    caches = await open_caches(worker, 2)
    with monkeypatch.context() as patch:
        patch.setattr(worker._runner, "run", None)
        works = (worker.run(step(cache, states(1), 0)) for cache in caches)
        results = await asyncio.gather(*works, return_exceptions=True)
    assert all(isinstance(result, TypeError) for result in results)
    await worker.run(step(caches[0], states(1), 0))
    worker.close()


async def test_work_that_is_held_goes_on_by_itself_and_is_dropped_when_it_is_cancelled(recorded: Recorded) -> None:
    executor = ManualExecutor()
    limits = replace(LIMITS, small_chunk_tokens=2, shares=ShareLimits(burst_s=0.0, share=1e-3, active_s=1.0))
    worker = ComputeWorker(executor, runner=recorded.runner, limits=limits)
    held, other = recorded.runner.new_cache(1, 40), recorded.runner.new_cache(1, 40)
    prefill = asyncio.create_task(worker.run(StepWork(held, SPAN, 0, to_wire(states(6)), owner=PEER)))
    await worker_step(worker, executor, other)
    assert [tokens for _, tokens, _ in recorded.forwards] == [4, 1]
    assert held.position == 4
    prefill.cancel()
    await asyncio.wait([prefill])
    executor.go()
    assert not worker._tickets
    assert held.position == 0
    # It still owes. After a second without others' steps it goes on, though nobody submits anything.
    prefill = asyncio.create_task(worker.run(StepWork(held, SPAN, 0, to_wire(states(6)), owner=PEER)))
    await asyncio.sleep(0.01)
    executor.go()
    assert held.position == 0
    await asyncio.sleep(1.1)
    executor.go()
    await prefill
    assert held.position == 6
    worker.close()


async def worker_step(worker: ComputeWorker, executor: ManualExecutor, cache: KVCache) -> None:
    """Run what waits together with a step of another peer."""
    task = asyncio.create_task(worker.run(StepWork(cache, SPAN, 0, to_wire(states(1)), owner=OTHER)))
    await asyncio.sleep(0.01)
    executor.go()
    await task


async def test_what_costs_as_much_as_a_piece_counts_as_one(recorded: Recorded) -> None:
    limits = BatchLimits(chunk_tokens=4, max_rows=2, max_padded_tokens=150)
    runner = WorkRunner(recorded.runner, limits)
    wide, copied, small = (recorded.runner.new_cache(rows, 90) for rows in (3, 2, 2))
    for cache, num_tokens in ((copied, 80), (small, 40)):
        recorded.runner.run_step(cache, states(num_tokens, num_rows=2), 0, SPAN)
    works = {
        AllocateWork(SPAN, 1, 40, PEER): Kind.ALLOCATE,
        AllocateWork(SPAN, 1, 640, PEER, (b"p" * 16,)): Kind.PREFILL,
        StepWork(small, SPAN, 40, to_wire(states(1, num_rows=2)), (0, 0), owner=PEER): Kind.DECODE,
        StepWork(copied, SPAN, 80, to_wire(states(1, num_rows=2)), owner=PEER): Kind.DECODE,
        StepWork(copied, SPAN, 0, to_wire(states(1, num_rows=2)), (0, 0), owner=PEER): Kind.PREFILL,
        StepWork(wide, SPAN, 0, to_wire(states(1, num_rows=3)), owner=PEER): Kind.PREFILL,
    }
    for work, kind in works.items():
        job = Job(1, work, 0.0)
        waiting = runner._describe(job, False)
        assert (waiting.kind, waiting.peer) == (kind, PEER), work
        batch = runner.next_batch([job])
        assert batch is not None
        runner.run([job], batch)
        assert job.is_finished
        assert job.error is None
