"""Streams and links of the network in memory (`memory_net.py` has the peers and the script).

What one end sends is *under way* until it arrives, after the link's delay and at its bandwidth, in order. While the
link is blocked (a peer frozen, a pair cut), what arrives is held back, ends of streams too. What has arrived waits to
be received. A sender waits while more than the window is under way, held or unread.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from swarm_protocol.errors import FrameTooLargeError, StreamLostError
from swarm_protocol.ids import PeerId
from swarm_protocol.transport.base import MAX_FRAME_BYTES, Buffer


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """What one direction of a link is like."""

    delay_s: float = 0.0
    """From the last byte sent to the last byte received."""

    bandwidth_bytes_per_s: float | None = None
    """Shared by all streams of this direction; None has no limit."""

    loss: float = 0.0
    """The probability that a frame ends its stream instead of arriving."""


@dataclass(slots=True)
class Link:
    """One direction between two peers."""

    profile: LinkProfile
    window_bytes: int
    rng: random.Random
    is_blocked: Callable[[], bool]
    free_at_s: float = 0.0

    def arrival_s(self, now_s: float, size_bytes: int) -> float:
        """Occupy the link for a frame sent now, and return when it arrives."""
        start_s = max(now_s, self.free_at_s)
        bandwidth = self.profile.bandwidth_bytes_per_s
        self.free_at_s = start_s + (size_bytes / bandwidth if bandwidth else 0.0)
        return self.free_at_s + self.profile.delay_s


@dataclass(slots=True)
class Fuse:
    """How many frames a pair of ends may still send before the stream breaks."""

    num_frames: int


class MemoryStream:
    """One end of a stream. `connect` gives it the other one."""

    other: "MemoryStream"

    def __init__(self, owner: PeerId, peer_id: PeerId, link: Link, on_end: Callable[["MemoryStream"], None]) -> None:
        self.owner = owner
        self.fuse: Fuse | None = None
        self._peer_id = peer_id
        self._link = link  # from the owner to the peer
        self._on_end = on_end
        self._under_way: deque[bytes | None] = deque()  # towards this end; None is the end of the stream
        self._num_arrived = 0  # how many of them are only held back
        self._last_arrival_s = 0.0
        self._inbox: deque[bytes] = deque()
        self._unread_bytes = 0  # of what the other end sent
        self._end: str | None = None
        self._waiting: set[asyncio.Future[None]] = set()

    @property
    def peer_id(self) -> PeerId:
        """The remote peer."""
        return self._peer_id

    @property
    def is_ended(self) -> bool:
        """Whether nothing more can be sent on this end, nor will arrive at it."""
        return self._end is not None

    async def send(self, parts: Sequence[Buffer]) -> None:
        """Send one frame; waits while the window is full. Cancelling it ends the stream, as the contract says."""
        frame = _checked(parts)
        try:
            while self._is_full(frame):
                await self._until_changed()
        except asyncio.CancelledError:
            self.end("a send was cancelled")
            self.other.arrive_later(None, self._link.arrival_s(asyncio.get_running_loop().time(), 0))
            raise
        self._put(frame)

    def send_now(self, parts: Sequence[Buffer]) -> bool:
        """Send one frame if the window has room for it."""
        frame = _checked(parts)
        if self._is_full(frame):
            return False
        self._put(frame)
        return True

    def _is_full(self, frame: bytes) -> bool:
        return not self.is_ended and 0 < self.other._unread_bytes > self._link.window_bytes - len(frame)

    def _put(self, frame: bytes) -> None:
        self._raise_if_ended()
        self._burn_fuse()
        arrival_s = self._link.arrival_s(asyncio.get_running_loop().time(), len(frame))
        if self._link.rng.random() < self._link.profile.loss:
            self.end("the stream broke")
            self.other.arrive_later(None, arrival_s)
            self._raise_if_ended()
        self.other._unread_bytes += len(frame)
        self.other.arrive_later(frame, arrival_s)

    async def receive(self) -> bytes:
        """Return the next frame; one task at a time."""
        while not self._inbox:
            self._raise_if_ended()
            await self._until_changed()
        frame = self._inbox.popleft()
        self._unread_bytes -= len(frame)
        self.other._wake()
        return frame

    async def close(self) -> None:
        """End the stream; the peer can still receive what was sent."""
        if not self.is_ended:
            self.end("the stream was closed on this side")
            self.other.arrive_later(None, self._link.arrival_s(asyncio.get_running_loop().time(), 0))
        await asyncio.sleep(0)

    # --- for the network ----------------------------------------------------------------------------------------------

    def end(self, reason: str) -> None:
        """End this end alone, now. What has arrived can still be received."""
        if self._end is None:
            self._end = reason
            self._under_way.clear()
            self._num_arrived = 0
            self._wake()
            self._on_end(self)

    def arrive_later(self, item: bytes | None, arrival_s: float) -> None:
        """Let `item`, a frame or None for the end of the stream, arrive here at `arrival_s`, after all before it."""
        if self.is_ended:
            return
        loop = asyncio.get_running_loop()
        self._last_arrival_s = max(arrival_s, self._last_arrival_s)
        self._under_way.append(item)
        if self._last_arrival_s <= loop.time():
            loop.call_soon(self._arrive)
        else:
            loop.call_at(self._last_arrival_s, self._arrive)

    def deliver_held(self) -> None:
        """Deliver what has arrived, unless the link is blocked."""
        while self._num_arrived > 0 and not self.other._link.is_blocked():
            self._num_arrived -= 1
            item = self._under_way.popleft()
            if item is None:
                self.end("the peer ended the stream")
            else:
                self._inbox.append(item)
                self._wake()

    def _arrive(self) -> None:
        # Timers of the same instant fire in any order, so each stands for the next item and not for its own.
        if not self.is_ended:
            self._num_arrived += 1
            self.deliver_held()

    def _burn_fuse(self) -> None:
        if self.fuse is None:
            return
        if self.fuse.num_frames == 0:
            self.end("the stream broke")
            self.other.end("the stream broke")
            self._raise_if_ended()
        self.fuse.num_frames -= 1

    def _raise_if_ended(self) -> None:
        if self._end is not None:
            raise StreamLostError(self._end)

    async def _until_changed(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.add(waiter)
        try:
            await waiter
        finally:
            self._waiting.discard(waiter)

    def _wake(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)


def _checked(parts: Sequence[Buffer]) -> bytes:
    frame = b"".join(parts)
    if not 0 < len(frame) <= MAX_FRAME_BYTES:
        raise FrameTooLargeError("frame", len(frame), MAX_FRAME_BYTES)
    return frame


def connect(one: MemoryStream, other: MemoryStream) -> None:
    """Make two ends one stream."""
    one.other, other.other = other, one
