"""One stream that is being served: messages in, and messages out through a bounded outbox that one task empties.

Several tasks answer on a stream, the reader its pongs and a step's task its reply, and the frames of two messages must
not be mixed. So answers are posted, which never waits, and a peer that does not read its answers loses the stream.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import islice

from server_node.admission import Admission
from swarm_protocol.errors import MalformedFrameError, StreamLostError
from swarm_protocol.ids import PeerId, short_peer
from swarm_protocol.messages import BackwardReply, ForwardReply, Message, StepReply, TapeSent
from swarm_protocol.transport.base import MAX_FRAME_BYTES, FrameStream
from swarm_protocol.wire import MessageAssembler, WireLimits, encode

logger = logging.getLogger(__name__)

_MAX_OUTBOX = 16
"""Answers that may wait: those of the steps in flight, and some pongs."""

_MAX_FRAMES = 1024
"""Of one message: 64 MiB in frames of 64 KiB. Each frame costs some 300 bytes besides its own, so that a message in
frames of a byte would take many times its size."""


class Link:
    """The serving side of one stream; works inside `open_link`. Belongs to the event loop."""

    def __init__(self, stream: FrameStream, admission: Admission, max_payload_bytes: int) -> None:
        self._stream = stream
        self._admission = admission
        self._rates = admission.rates
        self._limits = admission.limits
        self._max_payload_bytes = max_payload_bytes
        self._assembler = MessageAssembler(WireLimits(max_payload_bytes))
        self._held_bytes = 0
        self._outbox: deque[Message] = deque()
        self._outbox_bytes = 0
        self._posted = asyncio.Event()
        self._all_sent = asyncio.Event()
        self._is_finished = False
        self._is_broken = False
        self._account = stream.peer_id

    @property
    def peer_id(self) -> PeerId:
        return self._stream.peer_id

    def began(self) -> None:
        """Count the stream itself, or a peer that opens one after the other would be within every rate."""
        self._rates.message(self.peer_id, _now_s())

    def charge(self, account: PeerId) -> None:
        """From now on, count what comes as sent by another peer, for whom it is brought."""
        self.let_go()
        self._account = account

    def allow_payload(self, max_payload_bytes: int) -> None:
        """From the next message on, let in so much; what was let in before is complete."""
        self._max_payload_bytes = max_payload_bytes
        self._assembler = MessageAssembler(WireLimits(max_payload_bytes))

    async def receive(self, deadline: float | None) -> Message:
        """Return the next message.

        Its memory counts as held for the peer until the next call. While the peer is over its rates nothing is read,
        and no deadline comes closer. Raises TimeoutError if none begins before the loop's clock shows `deadline`,
        StreamLostError at the end of the stream or if the rest of a message stays away or comes too slowly,
        LimitExceededError if too much is held, and ProtocolError if this is no message that is let in.
        """
        self.let_go()
        waited_s = await self._until_within_rates()
        async with asyncio.timeout_at(None if deadline is None else deadline + waited_s):
            frame = await self._receive_frame()
        if self._is_broken:
            raise StreamLostError("the peer does not read its answers")
        message = self._assembler.feed(frame)
        self._rates.message(self._account, _now_s())
        return await self._rest(frame) if message is None else message

    async def _receive_frame(self) -> bytes:
        frame = await self._stream.receive()
        self._rates.frame(self._account, len(frame), _now_s())
        return frame

    async def _until_within_rates(self) -> float:
        """Wait if the peer is over its rates, on whatever stream it sent too much; return for how long."""
        wait_s = self._rates.wait_s(self._account, _now_s())
        if wait_s:
            await asyncio.sleep(wait_s)
        return wait_s

    async def _rest(self, frame: bytes) -> Message:
        """Return the message that begins with `frame`, once all of it is here."""
        frame_s, began_s = self._limits.frame_s, _now_s()
        message: Message | None = None
        for _ in range(_MAX_FRAMES):
            self._admission.hold(self._account, len(frame))
            self._held_bytes += len(frame)
            began_s += await self._until_within_rates()
            # Every frame may take its time, but not so that many small ones are slower than full ones.
            slowest_s = began_s + frame_s * (1 + self._held_bytes / MAX_FRAME_BYTES)
            try:
                async with asyncio.timeout_at(min(_now_s() + frame_s, slowest_s)):
                    frame = await self._receive_frame()
            except TimeoutError:
                raise StreamLostError(f"the rest of a message did not come at a frame in {frame_s:g} s") from None
            message = self._assembler.feed(frame)
            if message is not None:
                return message
        raise MalformedFrameError(f"a message came in more than {_MAX_FRAMES} frames")

    def let_go(self) -> None:
        """Count no memory as held any more."""
        if self._held_bytes:
            self._admission.unhold(self._account, self._held_bytes)
            self._held_bytes = 0

    def post(self, message: Message) -> None:
        """Send `message` as soon as those before it are sent; lost if the stream ends first."""
        if self._is_broken or (self._all_sent.is_set() and self._sends_now(message)):
            return
        size_bytes = _payload_bytes(message)
        if len(self._outbox) >= _MAX_OUTBOX or (
            self._outbox_bytes and self._outbox_bytes + size_bytes > 2 * self._max_payload_bytes
        ):
            self._is_broken = True
        else:
            self._outbox.append(message)
            self._outbox_bytes += size_bytes
            self._all_sent.clear()
        self._posted.set()

    def _sends_now(self, message: Message) -> bool:
        """Send a message of one frame if nothing has to be waited for: a turn of the loop less for each step."""
        frames = list(islice(encode(message), 2))
        try:
            return len(frames) == 1 and self._stream.send_now(frames[0])
        except StreamLostError:
            return False  # the writer finds out

    async def all_sent(self) -> None:
        """Wait until what was posted is sent. Raises StreamLostError if it cannot be."""
        await self._all_sent.wait()
        if self._is_broken:
            raise StreamLostError("the answers cannot be sent")

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
                    message = self._outbox.popleft()
                    self._outbox_bytes -= _payload_bytes(message)
                    await self._send(message)
                elif self._is_finished:
                    break
                else:
                    self._all_sent.set()
                    self._posted.clear()
                    await self._posted.wait()
        except (StreamLostError, TimeoutError) as error:
            logger.debug("answers cannot be sent: %s peer=%s", error or "timeout", short_peer(self.peer_id))
        finally:
            self._is_broken = True
            self._outbox.clear()
            self._all_sent.set()
            await self._stream.close()

    async def _send(self, message: Message) -> None:
        for parts in encode(message):
            async with asyncio.timeout(self._limits.send_s):
                await self._stream.send(parts)


def _payload_bytes(message: Message) -> int:
    if isinstance(message, StepReply | ForwardReply | TapeSent):
        return memoryview(message.hidden_states.data).nbytes
    return memoryview(message.gradients.data).nbytes if isinstance(message, BackwardReply) else 0


def _now_s() -> float:
    return asyncio.get_running_loop().time()


@asynccontextmanager
async def open_link(link: Link) -> AsyncIterator[None]:
    """Serve `link`: what is posted inside is sent, the last of it on the way out, and then the stream is closed.

    Errors raised inside come out in an ExceptionGroup.
    """
    link.began()
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(link.write(), name="link-writer")
            try:
                yield
            finally:
                link.finish()
    finally:
        link.let_go()
