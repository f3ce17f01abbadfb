"""One stream that is being served: messages in, and messages out through a bounded outbox that one task empties.

Several tasks answer on a stream, the reader its pongs and a step's task its reply, and the frames of two messages must
not be mixed. So answers are posted, which never waits, and a peer that does not read its answers loses the stream.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from server_node.config import NodeLimits
from swarm_protocol.errors import StreamLostError
from swarm_protocol.ids import PeerId, short_peer
from swarm_protocol.messages import Message
from swarm_protocol.transport.base import FrameStream
from swarm_protocol.wire import MessageAssembler, WireLimits, encode

logger = logging.getLogger(__name__)

_MAX_OUTBOX = 16
"""Answers that may wait: those of the steps in flight, and some pongs."""


class Link:
    """The serving side of one stream; works inside `open_link`. Belongs to the event loop."""

    def __init__(self, stream: FrameStream, limits: NodeLimits, max_payload_bytes: int) -> None:
        self._stream = stream
        self._limits = limits
        self._assembler = MessageAssembler(WireLimits(max_payload_bytes))
        self._outbox: deque[Message] = deque()
        self._posted = asyncio.Event()
        self._is_finished = False
        self._is_broken = False

    @property
    def peer_id(self) -> PeerId:
        return self._stream.peer_id

    def allow_payload(self, max_payload_bytes: int) -> None:
        """From the next message on, let in so much; what was let in before is complete."""
        self._assembler = MessageAssembler(WireLimits(max_payload_bytes))

    async def receive(self, deadline: float | None) -> Message:
        """Return the next message.

        Raises TimeoutError if none begins before the loop's clock shows `deadline`, StreamLostError at the end of the
        stream or if the rest of a message stays away, and ProtocolError if this is no message that is let in.
        """
        async with asyncio.timeout_at(deadline):
            frame = await self._stream.receive()
        while (message := self._assembler.feed(frame)) is None:
            try:
                async with asyncio.timeout(self._limits.frame_s):
                    frame = await self._stream.receive()
            except TimeoutError:
                raise StreamLostError(f"the rest of a message did not come within {self._limits.frame_s:g} s") from None
        return message

    def post(self, message: Message) -> None:
        """Send `message` as soon as those before it are sent; lost if the stream ends first."""
        if len(self._outbox) >= _MAX_OUTBOX:
            self._is_broken = True
        else:
            self._outbox.append(message)
        self._posted.set()

    async def abort(self) -> None:
        """End the stream now; whoever waits on it sees StreamLostError."""
        self._is_broken = True
        self._posted.set()
        await self._stream.close()

    def finish(self) -> None:
        """End the stream once what was posted is sent."""
        self._is_finished = True
        self._posted.set()

    async def write(self) -> None:
        """Send what is posted until the link is finished or the stream ends; the task of `open_link`."""
        try:
            while not self._is_broken:
                if self._outbox:
                    await self._send(self._outbox.popleft())
                elif self._is_finished:
                    break
                else:
                    self._posted.clear()
                    await self._posted.wait()
        except (StreamLostError, TimeoutError) as error:
            logger.debug("answers cannot be sent: %s peer=%s", error or "timeout", short_peer(self.peer_id))
        finally:
            self._is_broken = True
            await self._stream.close()

    async def _send(self, message: Message) -> None:
        for parts in encode(message):
            async with asyncio.timeout(self._limits.send_s):
                await self._stream.send(parts)


@asynccontextmanager
async def open_link(link: Link) -> AsyncIterator[None]:
    """Serve `link`: what is posted inside is sent, the last of it on the way out, and then the stream is closed.

    Errors raised inside come out in an ExceptionGroup.
    """
    async with asyncio.TaskGroup() as group:
        group.create_task(link.write(), name="link-writer")
        try:
            yield
        finally:
            link.finish()
