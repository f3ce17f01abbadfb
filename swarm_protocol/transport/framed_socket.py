"""Frames over a connected stream socket: what `hivemind_net` puts on the sockets between this process and its daemon.

Each frame is its length, 4 bytes big-endian, and then its bytes. A new socket first carries one message of the daemon's
own (its length as a varint, then a protobuf), the *preamble*, which says what the stream is.

States of a socket: PREAMBLE → FRAMES → ENDED, or PREAMBLE → ENDED. ENDED is final and is entered on the end of the
stream, on an error of the socket, on a frame that breaks the limits, and on `close` and `abort`. Frames that arrived
whole before the end can still be received after it.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from swarm_protocol.errors import FrameTooLargeError, StreamLostError
from swarm_protocol.ids import PeerId
from swarm_protocol.transport.base import MAX_FRAME_BYTES, Buffer

LENGTH_BYTES: Final = 4
MAX_PREAMBLE_BYTES: Final = 64 * 1024  # the daemon's answers are ids, addresses and error texts: a few hundred bytes
READ_HIGH_BYTES: Final = 256 * 1024  # stop reading above; so at most this, one frame and one scratch buffer are held
READ_LOW_BYTES: Final = READ_HIGH_BYTES // 2
SCRATCH_BYTES: Final = 256 * 1024  # Linux holds some 208 KiB in a unix socket: one read empties it
DIRECT_BYTES: Final = 64 * 1024  # what is missing of a body is read into its place from this size on: one copy less
JOIN_BYTES: Final = 64 * 1024  # parts up to this size go out in one system call, at the price of a copy
CLOSE_FLUSH_S: Final = 1.0  # for a peer that does not read: what was sent last may matter, waiting for ever does not


class FramedSocket(asyncio.BufferedProtocol):
    """One socket, as an asyncio protocol. Every method belongs to the event loop.

    `scratch` is where small reads land. It may be shared by all sockets of one loop: a read is taken out of it before
    the next one starts. `on_preamble` is called once, when the preamble is in; `on_end` once, when the socket is gone.
    """

    def __init__(
        self,
        scratch: bytearray,
        on_preamble: Callable[["FramedSocket"], None] | None = None,
        on_end: Callable[["FramedSocket"], None] | None = None,
    ) -> None:
        self.preamble: bytes | None = None
        self._scratch = memoryview(scratch)
        self._on_preamble = on_preamble
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        # What is being read: the bytes of a length that is cut, or a body of known length and how much of it is there.
        self._head = bytearray()
        self._body: bytearray | None = None
        self._filled = 0
        self._frames: deque[bytes] = deque()
        self._queued_bytes = 0
        self._is_reading_paused = False
        self._is_writing_paused = False
        self._end: Exception | None = None
        self._readable: asyncio.Future[None] | None = None
        self._writable: set[asyncio.Future[None]] = set()
        self._closed: asyncio.Future[None] = self._loop.create_future()

    # --- what the owner calls -----------------------------------------------------------------------------------------

    @property
    def is_ended(self) -> bool:
        """Whether nothing more can be sent or will arrive."""
        return self._end is not None

    async def receive_preamble(self) -> bytes:
        """Wait for the daemon's message. Raises StreamLostError if the socket ends before."""
        while self.preamble is None:
            self._raise_if_ended()
            await self._until_readable()
        return self.preamble

    def write_raw(self, data: bytes) -> None:
        """Send bytes as they are, before the first frame: a request to the daemon."""
        self._raise_if_ended()
        assert self._transport is not None
        self._transport.write(data)

    async def send(self, parts: Sequence[Buffer]) -> None:
        """Send one frame and wait until the kernel has taken all of it; then the parts may be changed.

        Whole frames are queued at once, so that several tasks may send.
        """
        self._write(parts)
        if not self._is_writing_paused:
            return
        try:
            await self._until_writable()
        except asyncio.CancelledError:
            self.abort()  # the parts belong to the caller again, and the kernel has only half of them
            raise

    def send_now(self, parts: Sequence[Buffer]) -> bool:
        """Send one frame if the kernel has taken all of those before it."""
        if self._is_writing_paused:
            return False
        self._write(parts)
        return True

    def _write(self, parts: Sequence[Buffer]) -> None:
        views = [memoryview(part).cast("B") for part in parts]
        size = sum(len(view) for view in views)
        if not 0 < size <= MAX_FRAME_BYTES:
            raise FrameTooLargeError("frame", size, MAX_FRAME_BYTES)
        self._raise_if_ended()
        assert self._transport is not None
        header = size.to_bytes(LENGTH_BYTES, "big")
        if size <= JOIN_BYTES:
            self._transport.write(b"".join((header, *views)))
        else:
            self._transport.write(header)
            for view in views:
                self._transport.write(view)
        if self._transport.is_closing():  # a write failed; asyncio says so only in the next turn of the loop
            self._finish(StreamLostError("the stream broke"))
            self._raise_if_ended()

    async def receive(self) -> bytes:
        """Return the next frame; one task at a time may wait. Cancelling loses nothing: frames leave the queue here."""
        while not self._frames:
            self._raise_if_ended()
            await self._until_readable()
        frame = self._frames.popleft()
        self._queued_bytes -= len(frame)
        if self._is_reading_paused and self._queued_bytes <= READ_LOW_BYTES and self._end is None:
            assert self._transport is not None
            self._is_reading_paused = False
            self._transport.resume_reading()
        return frame

    async def close(self) -> None:
        """Send what is still queued, end the socket, and wait until it is gone; the peer sees all frames, then the end.

        Idempotent. Where the peer does not read, what it has not taken after CLOSE_FLUSH_S is thrown away.
        """
        if self._transport is None:
            return
        self._finish(StreamLostError("the stream was closed on this side"))
        self._transport.close()
        try:
            await asyncio.wait([self._closed], timeout=CLOSE_FLUSH_S)
        finally:
            if not self._closed.done():
                self._transport.abort()

    def abort(self, error: Exception | None = None) -> None:
        """End the socket now; what was not sent is lost. `error` is what `receive` and `send` raise from then on."""
        self._finish(error or StreamLostError("the stream was closed on this side"))
        if self._transport is not None:
            self._transport.abort()

    # --- what asyncio calls -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the socket."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        # 0: writing counts as paused until the kernel has every byte. `send` then returns only when the caller's
        # buffers are no longer referred to (from Python 3.12 on, asyncio keeps views instead of copies).
        transport.set_write_buffer_limits(high=0)

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone, by either side."""
        reason = "the peer ended the stream" if exc is None else f"the stream broke: {exc}"
        self._finish(StreamLostError(reason))
        if not self._closed.done():
            self._closed.set_result(None)
            if self._on_end is not None:
                self._on_end(self)

    def eof_received(self) -> bool:
        """The peer will send nothing more. A stream with one live direction is of no use: it ends."""
        return False

    def pause_writing(self) -> None:
        """The kernel has not taken everything."""
        self._is_writing_paused = True

    def resume_writing(self) -> None:
        """The kernel has taken everything."""
        self._is_writing_paused = False
        self._wake_writers()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Say where the next bytes go: a long body is read straight into its place."""
        body = self._body
        if body is not None and len(body) - self._filled >= DIRECT_BYTES:
            return memoryview(body)[self._filled :]
        return self._scratch

    def buffer_updated(self, nbytes: int) -> None:
        """Take `nbytes` that were read to where `get_buffer` said."""
        if self._end is not None:
            return
        if self._body is not None and len(self._body) - self._filled >= DIRECT_BYTES:
            self._filled += nbytes
            self._finish_body_if_full()
        else:
            view = self._scratch[:nbytes]
            while view and self._end is None:
                view = self._take(view)
        if self._queued_bytes >= READ_HIGH_BYTES and not self._is_reading_paused and self._end is None:
            assert self._transport is not None
            self._is_reading_paused = True
            self._transport.pause_reading()

    # --- reading ------------------------------------------------------------------------------------------------------

    def _take(self, view: memoryview) -> memoryview:
        """Take the next piece, a length or a body or a part of one, and return the rest."""
        if self._body is not None:
            piece = view[: len(self._body) - self._filled]
            self._body[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            self._finish_body_if_full()
            return view[len(piece) :]
        if self.preamble is None:
            self._head.append(view[0])
            if view[0] < 0x80:
                size = sum((byte & 0x7F) << (7 * i) for i, byte in enumerate(self._head))
                self._start_body("daemon's message", size, MAX_PREAMBLE_BYTES)
            elif len(self._head) > LENGTH_BYTES:
                self.abort(StreamLostError("the daemon's answer makes no sense"))
            return view[1:]
        if not self._head and len(view) >= LENGTH_BYTES:
            size = int.from_bytes(view[:LENGTH_BYTES], "big")
            if 0 < size <= min(MAX_FRAME_BYTES, len(view) - LENGTH_BYTES):  # the usual case: a whole small frame
                self._deliver(bytes(view[LENGTH_BYTES : LENGTH_BYTES + size]))
                return view[LENGTH_BYTES + size :]
        piece = view[: LENGTH_BYTES - len(self._head)]
        self._head += piece
        if len(self._head) == LENGTH_BYTES:
            self._start_body("frame", int.from_bytes(self._head, "big"), MAX_FRAME_BYTES)
        return view[len(piece) :]

    def _start_body(self, what: str, size: int, limit: int) -> None:
        self._head.clear()
        if not 0 < size <= limit:
            self.abort(FrameTooLargeError(what, size, limit))
            return
        self._body, self._filled = bytearray(size), 0

    def _finish_body_if_full(self) -> None:
        assert self._body is not None
        if self._filled < len(self._body):
            return
        body, self._body = bytes(self._body), None
        if self.preamble is not None:
            self._deliver(body)
            return
        self.preamble = body
        self._wake_reader()
        if self._on_preamble is not None:
            self._on_preamble(self)

    def _deliver(self, frame: bytes) -> None:
        self._frames.append(frame)
        self._queued_bytes += len(frame)
        self._wake_reader()

    # --- waiting and ending -------------------------------------------------------------------------------------------

    def _raise_if_ended(self) -> None:
        if self._end is not None:
            raise self._end.with_traceback(None)

    def _finish(self, end: Exception) -> None:
        if self._end is None:
            self._end = end
            self._body = None
            self._wake_reader()
            self._wake_writers()

    async def _until_readable(self) -> None:
        assert self._readable is None, "two tasks receive from one stream"
        self._readable = self._loop.create_future()
        try:
            await self._readable
        finally:
            self._readable = None

    def _wake_reader(self) -> None:
        if self._readable is not None and not self._readable.done():
            self._readable.set_result(None)

    async def _until_writable(self) -> None:
        while self._is_writing_paused:
            self._raise_if_ended()
            waiter = self._loop.create_future()
            self._writable.add(waiter)
            try:
                await waiter
            finally:
                self._writable.discard(waiter)

    def _wake_writers(self) -> None:
        for waiter in self._writable:
            if not waiter.done():
                waiter.set_result(None)


class FramedStream:
    """A `FrameStream` over a `FramedSocket`."""

    def __init__(self, peer_id: PeerId, socket: FramedSocket) -> None:
        self._peer_id = peer_id
        self._socket = socket

    @property
    def peer_id(self) -> PeerId:
        """The remote peer, as the daemon authenticated it."""
        return self._peer_id

    async def send(self, parts: Sequence[Buffer]) -> None:
        """Send one frame; several tasks may."""
        await self._socket.send(parts)

    def send_now(self, parts: Sequence[Buffer]) -> bool:
        """Send one frame if nothing has to be waited for."""
        return self._socket.send_now(parts)

    async def receive(self) -> bytes:
        """Return the next frame; one task at a time."""
        return await self._socket.receive()

    async def close(self) -> None:
        """End the stream; the peer can still receive what was sent."""
        await self._socket.close()
