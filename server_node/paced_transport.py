"""A network on which all peers together have so many bytes a second in each direction, whatever they ask for.

It stands between a node and its network. A frame waits for its turn (`pacing.py`) before it is sent, and one that
came before it is handed on, which holds up the rest of its stream at the peer. What the daemon says to other peers by
itself, the directory above all, is not counted.
"""

import asyncio
from collections.abc import Sequence

from server_node.pacing import Frame, Pacing
from swarm_protocol.ids import PeerId
from swarm_protocol.transport.base import Buffer, Directory, FrameStream, StreamHandler, Transport


class PacedTransport:
    """A `Transport` whose streams keep to a rate."""

    def __init__(self, transport: Transport, max_bytes_per_s: int) -> None:
        self._transport = transport
        self._outgoing, self._incoming = _Gate(max_bytes_per_s), _Gate(max_bytes_per_s)

    @property
    def peer_id(self) -> PeerId:
        """This peer's own id."""
        return self._transport.peer_id

    @property
    def addresses(self) -> Sequence[str]:
        """The multiaddresses under which others can reach this peer."""
        return self._transport.addresses

    @property
    def directory(self) -> Directory:
        """The swarm's directory, which is not paced."""
        return self._transport.directory

    def now_s(self) -> float:
        """The swarm's clock."""
        return self._transport.now_s()

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        """Run `handler` for every stream that a peer opens under the name `protocol`."""

        async def handle(stream: FrameStream) -> None:
            mine = self._paced(stream)
            try:
                await handler(mine)
            finally:
                await mine.close()

        await self._transport.serve(protocol, handle)

    async def dial(self, peer_id: PeerId, protocol: str) -> FrameStream:
        """Open a stream to `peer_id`."""
        return self._paced(await self._transport.dial(peer_id, protocol))

    async def until_lost(self) -> None:
        """Wait until the network is lost for good."""
        await self._transport.until_lost()

    async def close(self) -> None:
        """Leave the network."""
        await self._transport.close()

    def _paced(self, stream: FrameStream) -> "_PacedStream":
        return _PacedStream(stream, self._outgoing, self._incoming)


def paced(transport: Transport, max_bytes_per_s: int | None) -> Transport:
    """Return `transport`, kept to a rate if there is one."""
    return transport if max_bytes_per_s is None else PacedTransport(transport, max_bytes_per_s)


class _Gate:
    """Lets frames through in one direction. Belongs to the event loop."""

    def __init__(self, bytes_per_s: int) -> None:
        self._clock = asyncio.get_running_loop().time
        self._pacing = Pacing(bytes_per_s, self._clock())
        self._waiters: dict[int, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def passes_now(self, stream: object, size_bytes: int) -> bool:
        """Let a frame of the stream through if it need not wait."""
        if self._waiters:
            return False
        frame = self._pacing.add(stream, size_bytes)
        if self._pacing.next(self._clock()) is frame:
            return True
        self._pacing.withdraw(frame)
        return False

    def give_back(self, size_bytes: int) -> None:
        """A frame that was let through has not been sent."""
        self._pacing.give_back(size_bytes, self._clock())

    async def passed(self, stream: object, size_bytes: int) -> None:
        """Wait until a frame of the stream may go."""
        frame = self._pacing.add(stream, size_bytes)
        waiter = self._waiters[frame.number] = asyncio.get_running_loop().create_future()
        self._let_through()
        try:
            await waiter
        finally:
            self._withdraw(frame)

    def ended(self, stream: object) -> None:
        """Forget a stream."""
        self._pacing.ended(stream)

    def _withdraw(self, frame: Frame) -> None:
        self._pacing.withdraw(frame)
        self._waiters.pop(frame.number, None)

    def _let_through(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while (frame := self._pacing.next(self._clock())) is not None:
            waiter = self._waiters.pop(frame.number, None)
            if waiter is not None and not waiter.done():
                waiter.set_result(None)
        wait_s = self._pacing.wait_s(self._clock())
        if wait_s is not None:
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._let_through)


class _PacedStream:
    """A `FrameStream` that keeps to the rates of both directions."""

    def __init__(self, stream: FrameStream, outgoing: _Gate, incoming: _Gate) -> None:
        self._stream = stream
        self._outgoing, self._incoming = outgoing, incoming
        self._arrived: bytes | None = None  # and waits for its turn

    @property
    def peer_id(self) -> PeerId:
        """The remote peer."""
        return self._stream.peer_id

    async def send(self, parts: Sequence[Buffer]) -> None:
        """Send one frame when it is its turn."""
        await self._outgoing.passed(self, _size_bytes(parts))
        await self._stream.send(parts)

    def send_now(self, parts: Sequence[Buffer]) -> bool:
        """Send one frame if nothing has to be waited for."""
        size_bytes = _size_bytes(parts)
        if not self._outgoing.passes_now(self, size_bytes):
            return False
        if self._stream.send_now(parts):
            return True
        self._outgoing.give_back(size_bytes)
        return False

    async def receive(self) -> bytes:
        """Return the next frame when it is its turn; until then, no other of this stream is read."""
        if self._arrived is None:
            self._arrived = await self._stream.receive()
        await self._incoming.passed(self, len(self._arrived))
        frame, self._arrived = self._arrived, None
        return frame

    async def close(self) -> None:
        """End the stream on both sides."""
        self._outgoing.ended(self)
        self._incoming.ended(self)
        await self._stream.close()


def _size_bytes(parts: Sequence[Buffer]) -> int:
    return sum(memoryview(part).nbytes for part in parts)
