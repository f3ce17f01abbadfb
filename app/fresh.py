"""What was read a moment ago: the database is not asked by every request, and changes still hold within seconds."""

import threading
import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

FRESH_S = 3.0
"""How old an answer may be: what one process changes, others see after that."""

MAX_KEPT = 4096
"""Answers; somebody who tries keys out must not fill the memory."""

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Fresh(Generic[K, V]):
    """Any thread."""

    def __init__(self, read: Callable[[K], V], fresh_s: float | None = None, max_kept: int = MAX_KEPT) -> None:
        """`fresh_s` None is `FRESH_S`. `read` is called by whoever asks, without a lock; what it raises is not kept."""
        self._read, self._max_kept = read, max_kept
        self._fresh_s = FRESH_S if fresh_s is None else fresh_s
        self._lock = threading.Lock()
        self._kept: dict[K, tuple[float, V]] = {}
        self._version = 0

    def get(self, key: K) -> V:
        """Return what `read` says of `key`, or said a moment ago."""
        now_s = time.monotonic()
        with self._lock:
            found = self._kept.get(key)
            version = self._version
        if found is not None and now_s - found[0] < self._fresh_s:
            return found[1]
        value = self._read(key)
        with self._lock:
            if version == self._version:  # else it may have been read before the change that made others forget
                if len(self._kept) >= self._max_kept:
                    self._kept.clear()
                self._kept[key] = (now_s, value)
        return value

    def forget(self) -> None:
        """Read everything anew from now on."""
        with self._lock:
            self._kept.clear()
            self._version += 1
