"""Pure: which frame goes next where all peers together have so many bytes a second; one direction.

Every stream gets its fair share: a frame's tag is the bytes that its stream would have had by its end if all waiting
streams took turns byte by byte, and the lowest tag goes first (self-clocked fair queueing, Golestani, INFOCOM 1994).
A stream with one small frame now and then is before those with prompts.

A frame goes once the bytes before it are paid for, so one of 2 MiB holds up the next one for as long as it takes at
that rate. Small frames, as those of decode steps, need not wait for that while they take less than half of the rate;
they count all the same, and the big ones wait longer.
"""

import heapq
from collections.abc import Hashable
from dataclasses import dataclass, field

from server_node.rates import TokenBucket

SMALL_BYTES = 64 * 1024
"""Up to which a frame is small: a step of one token of any model in float32, and of eight of BLOOM-176B in bfloat16."""

_BURST_S = 0.25
"""Of the rate: what may go at once after a pause."""

_SMALL_SHARE = 0.5
"""Of the rate: what small frames may take before their turn."""

_SLACK_S = 1e-6
"""Shorter waits are none: a timer may fire so much early."""


@dataclass(order=True, slots=True)
class Frame:
    """A frame that waits."""

    tag: float
    number: int
    size_bytes: int = field(compare=False)
    is_waiting: bool = field(compare=False, default=True)


class Pacing:
    """The frames of one direction. `now_s` must not go back."""

    def __init__(self, bytes_per_s: float, now_s: float) -> None:
        self._all = TokenBucket(bytes_per_s, _BURST_S * bytes_per_s, now_s)
        small_bytes_per_s = _SMALL_SHARE * bytes_per_s
        self._small = TokenBucket(small_bytes_per_s, _BURST_S * small_bytes_per_s, now_s)
        self._tags: dict[Hashable, float] = {}
        self._tag_now = 0.0
        self._num_frames = 0
        # Small ones and big ones.
        self._waiting: tuple[list[Frame], list[Frame]] = ([], [])

    def add(self, stream: Hashable, size_bytes: int) -> Frame:
        """Let a frame wait."""
        tag = self._tags[stream] = max(self._tag_now, self._tags.get(stream, 0.0)) + size_bytes
        self._num_frames += 1
        frame = Frame(tag, self._num_frames, size_bytes)
        heapq.heappush(self._waiting[size_bytes > SMALL_BYTES], frame)
        return frame

    def withdraw(self, frame: Frame) -> None:
        """Nobody waits for it any more."""
        frame.is_waiting = False

    def ended(self, stream: Hashable) -> None:
        """Forget a stream."""
        self._tags.pop(stream, None)

    def give_back(self, size_bytes: int, now_s: float) -> None:
        """A frame that went has not been sent after all."""
        for bucket in self._buckets(size_bytes):
            bucket.take(-size_bytes, now_s)

    def next(self, now_s: float) -> Frame | None:
        """Take the next frame that may go, if one may."""
        small, big = self._first(0), self._first(1)
        turn = min((frame for frame in (small, big) if frame is not None), default=None)
        first = turn
        if self._all.wait_s(now_s) > _SLACK_S:
            first = small if self._small.wait_s(now_s) <= _SLACK_S else None
        if first is None:
            return None
        if first is turn:
            self._tag_now = max(self._tag_now, first.tag)
        heapq.heappop(self._waiting[first is big])
        first.is_waiting = False
        for bucket in self._buckets(first.size_bytes):
            bucket.take(first.size_bytes, now_s)
        return first

    def wait_s(self, now_s: float) -> float | None:
        """Return for how long `next` has nothing to give; None if nothing waits."""
        small, big = self._first(0), self._first(1)
        if small is None and big is None:
            return None
        all_s = self._all.wait_s(now_s)
        return all_s if small is None else min(all_s, self._small.wait_s(now_s))

    def _first(self, kind: int) -> Frame | None:
        waiting = self._waiting[kind]
        while waiting and not waiting[0].is_waiting:
            heapq.heappop(waiting)
        return waiting[0] if waiting else None

    def _buckets(self, size_bytes: int) -> tuple[TokenBucket, ...]:
        return (self._all,) if size_bytes > SMALL_BYTES else (self._all, self._small)
