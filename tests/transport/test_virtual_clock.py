"""The virtual clock: time passes only when nothing else can happen."""

import asyncio
import threading
import time

import pytest

from swarm_protocol.transport.virtual_clock import DeadlockError, VirtualClockLoop, run_virtual, time_held


def now_s() -> float:
    return asyncio.get_running_loop().time()


def test_hours_of_sleep_take_no_time():
    async def main() -> float:
        await asyncio.sleep(3 * 3600)
        return now_s()

    start_s = time.monotonic()
    assert run_virtual(main()) == pytest.approx(3 * 3600)
    assert time.monotonic() - start_s < 5


def test_deadlines_fire_at_their_time():
    async def main() -> tuple[float, float]:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2.5):
                await asyncio.sleep(100)
        first = now_s()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 1)
        return first, now_s()

    assert run_virtual(main()) == pytest.approx((2.5, 3.5))


def test_sleepers_wake_in_the_order_of_their_times():
    async def main() -> list[float]:
        woken: list[float] = []

        async def sleeper(delay_s: float) -> None:
            await asyncio.sleep(delay_s)
            woken.append(delay_s)

        await asyncio.gather(*(sleeper(delay_s) for delay_s in (5, 0.001, 3, 0, 4.999)))
        return woken

    assert run_virtual(main()) == [0, 0.001, 3, 4.999, 5]


def test_many_small_steps_add_up():
    async def main() -> float:
        for _ in range(10_000):
            await asyncio.sleep(0.1)
        return now_s()

    assert run_virtual(main()) == pytest.approx(1000)


def test_a_deadlock_is_reported_with_the_tasks_that_wait():
    async def wait_for_godot() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        await asyncio.gather(wait_for_godot(), asyncio.sleep(1))

    with pytest.raises(DeadlockError, match=r"at 1\.000 s; 2 tasks wait: .*wait_for_godot:\d+ > Event\.wait"):
        run_virtual(main())


def test_a_task_that_only_polls_runs_into_the_limit():
    async def poll() -> None:
        while True:  # noqa: ASYNC110
            await asyncio.sleep(1)

    with pytest.raises(TimeoutError, match="1000 s of virtual time"):
        run_virtual(poll(), limit_s=1000)


def test_time_stands_still_while_a_thread_of_the_executor_works():
    async def main() -> float:
        async with asyncio.timeout(1):
            assert await asyncio.to_thread(lambda: time.sleep(0.05) or 7) == 7
        return now_s()

    assert run_virtual(main()) == 0.0


def test_time_stands_still_while_it_is_held():
    async def main() -> float:
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def work() -> None:
            time.sleep(0.05)
            loop.call_soon_threadsafe(done.set)

        thread = threading.Thread(target=work)
        with time_held():
            thread.start()
            async with asyncio.timeout(1):
                await done.wait()
        thread.join()
        return now_s()

    assert run_virtual(main()) == 0.0


def test_holding_time_means_nothing_to_an_ordinary_loop():
    async def main() -> None:
        with time_held():
            await asyncio.sleep(0)

    asyncio.run(main())


def test_the_loop_can_be_used_by_a_runner():
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(asyncio.sleep(60))
        assert runner.get_loop().time() == pytest.approx(60)
        runner.run(asyncio.sleep(60))
        assert runner.get_loop().time() == pytest.approx(120)
