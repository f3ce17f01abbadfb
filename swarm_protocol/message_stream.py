"""Messages over a frame stream, for the side that dials."""

from swarm_protocol.messages import Message
from swarm_protocol.transport.base import FrameStream
from swarm_protocol.wire import MessageAssembler, encode


class MessageStream:
    """Messages over a frame stream."""

    def __init__(self, frames: FrameStream) -> None:
        self._frames = frames
        self._assembler = MessageAssembler()

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
