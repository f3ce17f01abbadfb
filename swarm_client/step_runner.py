"""How a session's thread waits for work on the loop: other threads may end the wait, and events come in meanwhile.

A listener is called by the thread that waits: it may take its time, and what it raises ends the work, as an interrupt
would. The loop is never held up by it.
"""

import concurrent.futures
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

from swarm_client.events import EventListener, Recovered, SessionEvent
from swarm_client.loop_thread import LoopThread
from swarm_protocol.errors import CancelledStepError, SessionClosedError

T = TypeVar("T")

MAX_WAITING = 100
"""Events for a listener that is slow; the oldest give way. A wait makes one a second."""


class StepRunner:
    """Belongs to one thread at a time, but for `cancel` (any thread) and `put` (the loop's)."""

    def __init__(self, loop: LoopThread, listener: EventListener | None = None) -> None:
        """`listener` None drops all events; it may be exchanged while nothing runs."""
        self.listener = listener
        self._loop = loop
        self._running: concurrent.futures.Future[Any] | None = None
        self._cancel_lock = threading.Lock()
        self._is_cancellable = False
        self._is_cancelled = False
        self._events: deque[SessionEvent] = deque(maxlen=MAX_WAITING)
        self._recovered: deque[Recovered] = deque(maxlen=MAX_WAITING)
        self._changed = threading.Event()

    def cancel(self) -> None:
        """Let what runs end now with CancelledStepError; what is `cancellable` and runs next does so too."""
        with self._cancel_lock:
            self._is_cancelled = True
            if self._running is not None:
                self._running.cancel()

    @contextlib.contextmanager
    def cancellable(self) -> Iterator[None]:
        """Let a `cancel` that comes between the runs inside end the next one of them; outside it would do nothing."""
        is_outermost = not self._is_cancellable
        if is_outermost:
            self._is_cancellable, self._is_cancelled = True, False
        try:
            yield
        finally:
            if is_outermost:
                self._is_cancellable = False

    def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return what `work` returns. Raises what it or the listener raises, CancelledStepError, SessionClosedError."""
        with self._cancel_lock:
            if self._is_cancelled:
                raise CancelledStepError("the step was cancelled")
            self._running = running = self._loop.submit(work())
        try:
            return self._wait_for(running)
        except concurrent.futures.CancelledError:
            if not self._is_cancelled:
                raise SessionClosedError("the connection to the swarm was closed") from None
            raise CancelledStepError("the step was cancelled") from None
        except BaseException:
            running.cancel()
            raise
        finally:
            self._running = None

    def put(self, event: SessionEvent) -> None:
        """Take an event in; never blocks."""
        self._events.append(event)
        if isinstance(event, Recovered):
            self._recovered.append(event)
        self._changed.set()

    def take_recovered(self) -> list[Recovered]:
        """Return the recoveries since the last call."""
        found = []
        while self._recovered:
            found.append(self._recovered.popleft())
        return found

    def _wait_for(self, future: "concurrent.futures.Future[T]") -> T:
        if self.listener is None:
            try:
                return future.result()
            finally:
                self._events.clear()
        future.add_done_callback(lambda _: self._changed.set())
        while not future.done():
            self._changed.wait()
            self._changed.clear()
            self._hand_over(self.listener)
        self._hand_over(self.listener)  # the loop puts in what happened before the future is done
        return future.result()

    def _hand_over(self, listener: EventListener) -> None:
        while self._events:
            listener(self._events.popleft())
