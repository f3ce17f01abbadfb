"""The conversations whose clients may come back, and the sockets of each address. Any thread."""

import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from app.answer_log import KeepLimits, Refusal, ResumeBook
from app.config import SocketLimits

T = TypeVar("T")


class KeptConversations(Generic[T]):
    """A `ResumeBook` for all threads, on the clock of the process."""

    def __init__(self, limits: SocketLimits) -> None:
        self._lock = threading.Lock()
        self._book: ResumeBook[T] = ResumeBook(
            KeepLimits(limits.resume_per_address, limits.resume_max, limits.resume_text_s)
        )

    @property
    def num_detached(self) -> int:
        """How many are kept without a socket."""
        with self._lock:
            return self._book.num_detached

    def add(self, kept: T, address: str) -> str:
        """Note a conversation that has a socket; return the token by which it is found: 128 random bits."""
        token = secrets.token_hex(16)
        with self._lock:
            self._book.add(token, kept, address)
        return token

    def find(self, token: str) -> T | Refusal:
        """Return the conversation of a token, or why there is none."""
        with self._lock:
            return self._book.find(token, time.monotonic())

    def attach(self, token: str, address: str) -> bool:
        """A socket takes a conversation; return whether it was still there."""
        with self._lock:
            if isinstance(self._book.find(token, time.monotonic()), str):
                return False
            self._book.attach(token, address)
            return True

    def detach(self, token: str) -> bool:
        """A conversation lost its socket; return whether its answer may go on."""
        with self._lock:
            return self._book.detach(token, time.monotonic())

    def ended(self, token: str) -> None:
        """Nothing runs in a conversation without a socket any more: its text is kept for its time."""
        with self._lock:
            self._book.ended(token, time.monotonic())

    def forget(self, token: str) -> None:
        """Keep a conversation no longer."""
        with self._lock:
            self._book.forget(token)


class AddressCount:
    """Counts what each address holds, up to `limit`; 0 for no limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()

    @contextmanager
    def one(self, address: str) -> Iterator[bool]:
        """Count one more inside; gives whether it may be."""
        with self._lock:
            self._held[address] += 1
            may_be = not self._limit or self._held[address] <= self._limit
        try:
            yield may_be
        finally:
            with self._lock:
                self._held[address] -= 1
                if not self._held[address]:
                    del self._held[address]
