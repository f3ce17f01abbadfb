"""Requests that run, by the key that their client gave them, so that a repeated one does not run twice."""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager


class InFlight:
    """Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._replace: dict[Hashable, Callable[[], None]] = {}

    @contextmanager
    def alone(self, key: Hashable | None, on_replaced: Callable[[], None]) -> Iterator[None]:
        """Run as the only one with `key`: who has it already is told so and gives way. None is nobody's key.

        A client sends a request again when it has given up on the first one; a proxy may not have told us that.
        """
        if key is None:
            yield
            return
        with self._lock:
            before = self._replace.get(key)
            self._replace[key] = on_replaced
        if before is not None:
            before()
        try:
            yield
        finally:
            with self._lock:
                if self._replace.get(key) is on_replaced:
                    del self._replace[key]
