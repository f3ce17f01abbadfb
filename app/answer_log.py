"""Pure: the last frames of one answer by their numbers, and which conversations are kept for those who come back.

A frame's number (`seq`) counts all frames of an answer from 0 on. The ring drops the oldest ones beyond its size;
whoever asks for one of these has lost text, and is told so.
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

T = TypeVar("T")

Refusal = Literal["unknown", "expired", "lost"]

MAX_REMEMBERED = 1000  # tokens that expired, to tell them from wrong ones; 32 bytes each


class AnswerLog:
    """The frames of one answer, as many of the last ones as fit in `max_bytes`, and at least one."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._frames: deque[str] = deque()
        self._first_seq = 0
        self._size_bytes = 0

    @property
    def next_seq(self) -> int:
        """The number that the next frame gets."""
        return self._first_seq + len(self._frames)

    @property
    def first_seq(self) -> int:
        """The number of the oldest frame that is still here."""
        return self._first_seq

    @property
    def size_bytes(self) -> int:
        """What the frames take; they are ASCII."""
        return self._size_bytes

    def append(self, make: Callable[[int], str], unread_seq: int | None = None) -> None:
        """Keep the frame that `make` makes for its number; those from `unread_seq` on are not dropped for it."""
        frame = make(self.next_seq)
        self._frames.append(frame)
        self._size_bytes += len(frame)
        while self._size_bytes > self._max_bytes and len(self._frames) > 1 and self._first_seq != unread_seq:
            self._size_bytes -= len(self._frames.popleft())
            self._first_seq += 1

    def has(self, from_seq: int) -> bool:
        """Return whether an answer can be gone on with from this frame: nothing between it and the last is gone."""
        return self._first_seq <= from_seq <= self.next_seq

    def read(self, from_seq: int) -> str | None:
        """Return the frame of a number; None if it is not there yet. Raises LookupError if it is no longer there."""
        if not self.has(from_seq):
            raise LookupError(from_seq)
        return None if from_seq == self.next_seq else self._frames[from_seq - self._first_seq]

    def unread_bytes(self, from_seq: int) -> int:
        """Return the size of the frames from a number on."""
        return sum(len(self._frames[index]) for index in range(max(0, from_seq - self._first_seq), len(self._frames)))


@dataclass(frozen=True, slots=True)
class KeepLimits:
    """How many conversations without a socket are kept, of one address and in all, and how long."""

    per_address: int
    in_all: int
    text_s: float


@dataclass(slots=True)
class _Entry(Generic[T]):
    kept: T
    address: str
    is_detached: bool = False
    until_s: float | None = None  # None while somebody looks after it: a socket, or the one that lets it end


class ResumeBook(Generic[T]):
    """Conversations by their resume tokens.

    attached ── detach ──> running without a socket ── ended ──> text kept until `text_s` is over ──> expired
        ^────── attach ──────────┴──────────────── attach ────────────────┘
    """

    def __init__(self, limits: KeepLimits) -> None:
        self._limits = limits
        self._entries: OrderedDict[str, _Entry[T]] = OrderedDict()
        self._expired: deque[str] = deque(maxlen=MAX_REMEMBERED)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_detached(self) -> int:
        """How many are kept without a socket."""
        return sum(entry.is_detached for entry in self._entries.values())

    def add(self, token: str, kept: T, address: str) -> None:
        """Note a conversation that has a socket."""
        self._entries[token] = _Entry(kept, address)

    def find(self, token: str, now_s: float) -> T | Refusal:
        """Return what is kept under a token, or why nothing is."""
        self._expire(now_s)
        entry = self._entries.get(token)
        if entry is not None:
            return entry.kept
        return "expired" if token in self._expired else "unknown"

    def attach(self, token: str, address: str) -> None:
        """A socket took a conversation."""
        entry = self._entries[token]
        entry.is_detached, entry.until_s, entry.address = False, None, address

    def detach(self, token: str, now_s: float) -> bool:
        """A conversation lost its socket: return whether it may go on. The texts of others make room, oldest first."""
        self._expire(now_s)
        entry = self._entries.get(token)
        if entry is None:
            return False
        limits = self._limits
        if not (
            self._make_room(lambda other: other.address == entry.address, limits.per_address)
            and self._make_room(lambda other: True, limits.in_all)
        ):
            self.forget(token)
            return False
        entry.is_detached = True
        self._entries.move_to_end(token)
        return True

    def ended(self, token: str, now_s: float) -> None:
        """The answer of a conversation without a socket is over: only its text is kept now."""
        entry = self._entries.get(token)
        if entry is not None and entry.is_detached:
            entry.until_s = now_s + self._limits.text_s

    def forget(self, token: str) -> None:
        """Keep a conversation no longer."""
        self._entries.pop(token, None)

    def _make_room(self, is_meant: Callable[[_Entry[T]], bool], most: int) -> bool:
        """Return whether one more of those that are meant may be kept, after dropping texts that nobody came for."""
        found = [token for token, entry in self._entries.items() if entry.is_detached and is_meant(entry)]
        for token in found[:]:
            if len(found) < most:
                break
            if self._entries[token].until_s is not None:
                self._drop(token)
                found.remove(token)
        return len(found) < most

    def _expire(self, now_s: float) -> None:
        for token, entry in list(self._entries.items()):
            if entry.until_s is not None and now_s >= entry.until_s:
                self._drop(token)

    def _drop(self, token: str) -> None:
        del self._entries[token]
        self._expired.append(token)
