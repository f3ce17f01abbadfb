"""Messages over a frame stream, for a side that takes one after the other."""

from swarm_protocol.messages import Message
from swarm_protocol.transport.base import FrameStream
from swarm_protocol.wire import MessageAssembler, WireLimits, encode


class MessageStream:
    """Messages over a frame stream."""

    def __init__(self, frames: FrameStream, limits: WireLimits | None = None) -> None:
        """`limits` are for what is received."""
        self._frames = frames
        self._assembler = MessageAssembler(limits or WireLimits())

    async def send(self, message: Message) -> None:
        """Send `message`. A cancelled send leaves the stream unusable. Raises StreamLostError."""
        for parts in encode(message):
            await self._frames.send(parts)

    async def receive(self) -> Message:
        """Return the next message. Raises StreamLostError or ProtocolError."""
        while True:
            message = self._assembler.feed(await self._frames.receive())
            if message is not None:
                return message

    async def close(self) -> None:
        """End the stream. Idempotent."""
        await self._frames.close()
