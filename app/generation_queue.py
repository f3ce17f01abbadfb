"""The site's queue of generations: so many run at a time, the others wait their turn, first come, first served."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from app.errors import NoCapacityError

POLL_S = 0.2  # how often one that waits is asked whether it still wants to


class GenerationQueue:
    """Lets `running_max` generations run and `waiting_max` wait. Any thread."""

    def __init__(self, running_max: int, waiting_max: int) -> None:
        self._running_max, self._waiting_max = running_max, waiting_max
        self._changed = threading.Condition(threading.RLock())
        self._running = 0
        self._waiting: deque[object] = deque()

    @property
    def num_running(self) -> int:
        """How many run now."""
        return self._running

    @property
    def num_waiting(self) -> int:
        """How many wait now."""
        return len(self._waiting)

    @contextmanager
    def turn(self, on_wait: Callable[[int], None]) -> Iterator[None]:
        """Run what is inside when its turn comes.

        `on_wait` gets the position, 1 for the next one and 0 once the turn has come: first at once, then when it
        changed, and again each `POLL_S` of waiting; it may block, and what it raises leaves the queue.
        Raises NoCapacityError when too many wait already.
        """
        ticket = object()
        has_turn = self._enter(ticket)
        try:
            position = 0 if has_turn else self._position(ticket)
            on_wait(position)
            while position:
                position = self._wait(ticket, position)
                on_wait(position)
            yield
        finally:
            self._leave(ticket)

    def _enter(self, ticket: object) -> bool:
        with self._changed:
            if self._running < self._running_max and not self._waiting:
                self._running += 1
                return True
            if len(self._waiting) >= self._waiting_max:
                raise NoCapacityError("places in the queue", self._waiting_max)
            self._waiting.append(ticket)
            return False

    def _position(self, ticket: object) -> int:
        """Return the place of a ticket in the queue; one that is no longer in it has its turn."""
        with self._changed:
            return self._waiting.index(ticket) + 1 if ticket in self._waiting else 0

    def _wait(self, ticket: object, seen: int) -> int:
        with self._changed:
            if self._position(ticket) == seen:
                self._changed.wait(POLL_S)
            return self._position(ticket)

    def _leave(self, ticket: object) -> None:
        with self._changed:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            else:
                self._running -= 1
            while self._waiting and self._running < self._running_max:
                self._waiting.popleft()
                self._running += 1
            self._changed.notify_all()
