"""The line to one node: how it is dialed, and how long it may be silent. Belongs to the event loop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from swarm_client.routing.find_route import Hop
from swarm_client.sent import NotBroughtError, Sent
from swarm_protocol.errors import ProtocolError, StepTimeoutError, StreamLostError, error_from_wire
from swarm_protocol.ids import short_peer
from swarm_protocol.message_stream import MessageStream
from swarm_protocol.messages import (
    SESSION_PROTOCOL,
    Draining,
    ErrorReply,
    Message,
    OpenSession,
    Ping,
    Pong,
    ResumeSession,
    SendTape,
    Step,
)
from swarm_protocol.session_state import SessionState, State
from swarm_protocol.transport.base import Transport

NOTICE_S = 1.0
"""Within this, or four of its usual steps, a node that gives no sign of life is found out."""

WATCHED_BYTES = 64 * 1024
"""What is sent of a larger step may fill every buffer on the way to a node that is frozen."""

SLOWEST_BYTES_PER_S = 256 * 1024
"""What a link is given for a step's values, both ways, before a node is asked whether it is alive: 2 Mbit/s."""


@dataclass(frozen=True, slots=True)
class HopLimits:
    """Deadlines of one hop, and how far ahead it reserves, as in `ClientConfig`."""

    open_s: float
    step_s: float
    resume_s: float
    reserve_tokens: int


class NodeLine:
    """One stream after the other to the node of `hop`, for the session of `state`. One task may wait on it at a time.

    `is_replaceable` says whether other nodes could do the work now. If so, a node that gives no sign of life is given
    up soon; else it is waited for, up to the deadlines of `limits`.
    """

    def __init__(
        self,
        transport: Transport,
        hop: Hop,
        state: SessionState,
        limits: HopLimits,
        is_replaceable: Callable[[], Awaitable[bool]],
    ) -> None:
        self.hop = hop
        self.limits = limits
        self.is_replaceable = is_replaceable
        self.stream: MessageStream | None = None
        self.on_draining: Callable[[Draining], None] = lambda _: None
        self._transport = transport
        self._state = state
        self._usual_s = 0.0

    async def ask(self, request: OpenSession | ResumeSession) -> Message:
        """Dial, and return the answer to a stream's first message. Raises SwarmError: the node's own, too."""
        frames = await self._transport.dial(self.hop.peer_id, SESSION_PROTOCOL)
        stream = MessageStream(frames)
        try:
            await stream.send(request)
            reply = await stream.receive()
            if isinstance(reply, ErrorReply):
                raise error_from_wire(reply.code, reply.message, reply.retryable)
        except BaseException:
            await stream.close()
            raise
        self.stream = stream
        return reply

    async def send(self, message: Step | SendTape, sent: Sent) -> None:
        """Send what is about the step `sent`. Raises StepTimeoutError if it does not leave and others could do it."""
        if self.stream is None:
            raise StreamLostError(f"no stream to {short_peer(self.hop.peer_id)}")
        is_large = isinstance(message, Step) and memoryview(message.hidden_states.data).nbytes > WATCHED_BYTES
        sending = asyncio.ensure_future(self.stream.send(message)) if is_large else None
        try:
            if sending is None:
                await self.stream.send(message)
                return
            while not (await asyncio.wait([sending], timeout=self._patience_s(sent)))[0]:
                if await self.is_replaceable():
                    raise StepTimeoutError(f"{short_peer(self.hop.peer_id)} does not take what is sent to it")
            sending.result()
        except (asyncio.CancelledError, StepTimeoutError):
            if sending is not None:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
            await self.drop()
            raise

    async def receive(self, sent: Sent, *, is_brought: bool = False) -> Message:
        """Return the next message but a Pong or a notice.

        While none comes, ask the node for a sign of life: a prefill may take its time.

        Raises StepTimeoutError if it gives none and could be replaced, NotBroughtError if it is alive without the step.
        """
        if self.stream is None:
            raise StreamLostError(f"no stream to {short_peer(self.hop.peer_id)}")
        loop = asyncio.get_running_loop()
        started_s, patience_s = loop.time(), self._patience_s(sent)
        is_asked = False
        while True:
            try:
                async with asyncio.timeout(patience_s):
                    message = await self.stream.receive()
            except TimeoutError:
                if is_asked and await self.is_replaceable():
                    raise StepTimeoutError(
                        f"{short_peer(self.hop.peer_id)} gives no sign of life since {loop.time() - started_s:.1f} s"
                    ) from None
                if not is_asked:
                    await self.stream.send(Ping(sent.step_id))
                    is_asked = True
                continue
            if isinstance(message, Draining):
                self.on_draining(message)
                continue
            if not isinstance(message, Pong):
                if sent.shape[1] == 1:
                    self._usual_s += 0.2 * (loop.time() - started_s - self._usual_s)
                return message
            if is_brought and message.last_step_id < sent.step_id:
                raise NotBroughtError(f"step {sent.step_id} does not arrive at {short_peer(self.hop.peer_id)}")
            is_asked = False

    async def listen(self) -> None:
        """Take what the node says of itself, until the stream ends or something else comes. While nobody receives."""
        while self.stream is not None:
            try:
                message = await self.stream.receive()
            except (StreamLostError, ProtocolError):
                return
            if not isinstance(message, Draining):
                return
            self.on_draining(message)

    def _patience_s(self, sent: Sent) -> float:
        """Return how long a node that is well may be silent, at most, before it is asked."""
        return max(NOTICE_S, 4 * self._usual_s) / 2 + 2 * sent.num_bytes / SLOWEST_BYTES_PER_S

    async def drop(self) -> None:
        """End the stream; the session may be taken up on another one."""
        if self._state.state is State.OPEN:
            self._state.dropped()
        stream, self.stream = self.stream, None
        if stream is not None:
            await stream.close()

    @contextlib.asynccontextmanager
    async def deadline(self, timeout_s: float, what: str) -> AsyncIterator[None]:
        """Let what happens inside take so long at most. Raises StepTimeoutError."""
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError:
            raise StepTimeoutError(
                f"{what} at {short_peer(self.hop.peer_id)} took longer than {timeout_s:g} s"
            ) from None
