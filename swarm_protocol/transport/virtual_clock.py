"""An asyncio event loop whose time is virtual: scenarios with delays, deadlines and timeouts run without sleeping.

When something is ready, it runs and no time passes. When nothing is, time jumps to the next timer. When there is no
timer either, nothing can ever happen again and `DeadlockError` says so. Everything that asks the loop for the time
(`asyncio.sleep`, `asyncio.timeout`, `loop.call_later`) follows; `time.time` and `time.monotonic` do not.

Other threads live in real time. While one works for the loop, virtual time has to stand still: `run_in_executor` and
`asyncio.to_thread` see to that, anything else is put into `time_held()`.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

EXTERNAL_LIMIT_S = 60.0
"""Real seconds to wait for a thread that holds the time; longer is taken for a deadlock. Above any step of a test."""


class DeadlockError(RuntimeError):
    """Nothing is ready, no timer is set, and no thread holds the time: the tasks would wait forever."""


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """A loop that starts at time 0.0 and jumps from timer to timer. Belongs to the thread that runs it."""

    def __init__(self, limit_s: float | None = None) -> None:
        """Make a loop; a jump beyond `limit_s` raises TimeoutError, for tasks that poll and never deadlock."""
        self._limit_s = limit_s
        self._virtual_now_s = 0.0
        self._num_holds = 0
        super().__init__(_JumpingSelector(self))  # type: ignore[arg-type]  # it is one but for the base class
        # asyncio runs timers that are due within the clock's resolution; the real clock's would do, but a fixed one
        # keeps runs on different machines alike. It covers the rounding of sums of floats.
        self._clock_resolution = 1e-9

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self._virtual_now_s

    @contextmanager
    def time_held(self) -> Iterator[None]:
        """Keep virtual time from jumping while a thread works for this loop."""
        self._num_holds += 1
        try:
            yield
        finally:
            self._num_holds -= 1

    # The superclass annotates its result as a future of the function's result; so is this one.
    def run_in_executor(self, executor: Executor | None, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """Run `func` in a thread; virtual time stands still until it is done."""
        future = super().run_in_executor(executor, func, *args)
        self._num_holds += 1
        future.add_done_callback(self._release)
        return future

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Wait for the threads of the default executor, in real time."""
        with self.time_held():
            await super().shutdown_default_executor()

    def _release(self, _future: asyncio.Future[T]) -> None:
        self._num_holds -= 1

    def _wait(self, real: selectors.BaseSelector, timeout: float | None) -> list[tuple[selectors.SelectorKey, int]]:
        """Stand in for the wait at the end of each turn of the loop; `timeout` is the time to the next timer."""
        events = real.select(0)
        if events or (timeout is not None and timeout <= 0):
            return events
        if self._num_holds > 0:
            events = real.select(EXTERNAL_LIMIT_S)
            if not events:
                raise DeadlockError(f"time was held for {EXTERNAL_LIMIT_S:.0f} s by a thread; {self._describe_tasks()}")
            return events
        if timeout is None:
            raise DeadlockError(f"nothing is ready, no timer is set at {self.time():.3f} s; {self._describe_tasks()}")
        if self._limit_s is not None and self._virtual_now_s + timeout > self._limit_s:
            limit_s, self._limit_s = self._limit_s, None  # once: cleaning up may take time, too
            raise TimeoutError(f"not done after {limit_s:g} s of virtual time; {self._describe_tasks()}")
        self._virtual_now_s += timeout
        return events

    def _describe_tasks(self) -> str:
        waiting = [f"{task.get_name()} in {_where(task)}" for task in asyncio.all_tasks(self)]
        return f"{len(waiting)} tasks wait: " + "; ".join(sorted(waiting)[:20])


class _JumpingSelector:
    """A selector that hands each wait to the loop. It only forwards; asyncio asks no more of a selector."""

    def __init__(self, loop: VirtualClockLoop) -> None:
        self._loop = loop
        self._real = selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return self._loop._wait(self._real, timeout)

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.modify(fileobj, events, data)

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.get_key(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._real.get_map()

    def close(self) -> None:
        self._real.close()


def run_virtual(main: Coroutine[Any, Any, T], *, limit_s: float | None = 86_400.0) -> T:
    """Run `main` on a new `VirtualClockLoop`, like `asyncio.run`, and return its result.

    Raises TimeoutError when `main` is not done after `limit_s` of virtual time (None has no limit), DeadlockError when
    everything waits for everything.
    """
    with asyncio.Runner(loop_factory=lambda: VirtualClockLoop(limit_s)) as runner:
        return runner.run(main)


@contextmanager
def time_held() -> Iterator[None]:
    """Keep the running loop's time from jumping while a thread works for it; nothing happens on an ordinary loop."""
    loop = asyncio.get_running_loop()
    if isinstance(loop, VirtualClockLoop):
        with loop.time_held():
            yield
    else:
        yield


def _where(task: asyncio.Task[Any]) -> str:
    """Name the innermost coroutines in which a task waits, outer ones first."""
    names: list[str] = []
    coroutine: Any = task.get_coro()
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        names.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
        coroutine = coroutine.cr_await
    return " > ".join(names[-3:])
