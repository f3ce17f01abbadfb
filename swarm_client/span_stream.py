"""One hop of a session: the client's end of the stream to one node. Belongs to the event loop."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from swarm_client.routing.find_route import Hop, ModelKey
from swarm_protocol.errors import (
    CacheFullError,
    InvalidTensorError,
    PeerUnreachableError,
    ProtocolError,
    StepTimeoutError,
    StreamLostError,
    SwarmError,
    UnexpectedMessageError,
    UnsupportedVersionError,
    error_from_wire,
)
from swarm_protocol.ids import short_id, short_peer
from swarm_protocol.messages import (
    PAGE_TOKENS,
    PROTOCOL_VERSIONS,
    SESSION_PROTOCOL,
    CloseSession,
    ErrorReply,
    Message,
    OpenSession,
    Ping,
    Pong,
    ResumeSession,
    SessionOpened,
    SessionResumed,
    Step,
    StepReply,
    WireTensor,
)
from swarm_protocol.session_state import SessionState, State
from swarm_protocol.transport.base import FrameStream, Transport
from swarm_protocol.wire import MessageAssembler, encode

logger = logging.getLogger(__name__)

RESUME_PAUSE_S = 0.3
"""Between two tries to take a dropped stream up again: a node that restarts its stream listener needs about as long."""

RESUME_TRY_S = 1.0
"""For the first try where another node could do the work: a node that is well answers sooner."""

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


def _num_bytes(step: Step) -> int:
    return memoryview(step.hidden_states.data).nbytes


def tokens_to_reserve(num_tokens: int, ahead: int, max_length: int) -> int:
    """Return the reservation for a session of `num_tokens` tokens that may grow to `max_length`: whole pages."""
    wanted = num_tokens + max(ahead, num_tokens // 4)
    return min(max_length, -(-wanted // PAGE_TOKENS) * PAGE_TOKENS)


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


class SpanStream:
    """A session's stream to the node that runs `hop.span`; taken up again when it drops.

    `is_replaceable` says whether other nodes could do the work now. If so, a node that is gone or gives no sign of life
    is given up soon; else it is waited for, up to the deadlines of `limits`.
    """

    def __init__(
        self,
        transport: Transport,
        hop: Hop,
        session_id: bytes,
        max_length: int,
        limits: HopLimits,
        is_replaceable: Callable[[], Awaitable[bool]],
    ) -> None:
        self.hop = hop
        self._is_replaceable = is_replaceable
        self._usual_s = 0.0
        self._transport = transport
        self._limits = limits
        self._session_id = session_id
        self._state = SessionState(max_length)
        self._stream: MessageStream | None = None
        self._resume_token = b""
        self._unanswered: Step | None = None
        self._reserved_tokens = 0

    async def open(self, model: ModelKey, batch_size: int, reserve_tokens: int, prefix: tuple[bytes, ...] = ()) -> int:
        """Reserve the session at the node; return how many tokens of `prefix`, hashes of pages, are cached there.

        Raises SwarmError: what the node answered, or why it cannot be reached.
        """
        request = OpenSession(
            self._session_id,
            PROTOCOL_VERSIONS,
            model.name,
            model.revision,
            self.hop.span.start,
            self.hop.span.end,
            batch_size,
            reserve_tokens,
            prefix=prefix,
        )
        async with self._deadline(self._limits.open_s, "opening a session"):
            reply = await self._ask(request)
        if not isinstance(reply, SessionOpened):
            raise UnexpectedMessageError(f"{type(reply).__name__} came, SessionOpened was expected")
        if reply.version not in PROTOCOL_VERSIONS:
            raise UnsupportedVersionError([reply.version], PROTOCOL_VERSIONS)
        if reply.cached_tokens > min(len(prefix) * PAGE_TOKENS, reserve_tokens):
            raise UnexpectedMessageError(f"{reply.cached_tokens} tokens are said to be cached, fewer were named")
        self._resume_token = reply.resume_token
        self._reserved_tokens = reserve_tokens
        self._state.opened(reply.cached_tokens)
        return reply.cached_tokens

    async def step(
        self, hidden_states: WireTensor, position: int, row_order: tuple[int, ...] | None = None
    ) -> StepReply:
        """Return the node's reply to one step.

        A dropped stream is resumed on the way. After a cancelled step the next one first waits for the old reply.
        Where the reservation is too small, the step extends it. Raises SwarmError; a retryable one leaves the session
        usable only if this hop is replaced.
        """
        if self._unanswered is not None:
            try:
                await self._answer_to(self._unanswered, is_sent=True)
            except SwarmError:
                if self._unanswered is not None:
                    raise
        needed = position + hidden_states.shape[1]
        if needed <= self._reserved_tokens:
            return await self._run(hidden_states, position, row_order, None)
        wished = tokens_to_reserve(needed, self._limits.reserve_tokens, self._state.max_length)
        try:
            return await self._run(hidden_states, position, row_order, max(needed, wished))
        except CacheFullError:
            if wished <= needed:
                raise
        return await self._run(hidden_states, position, row_order, needed)

    async def _run(
        self, hidden_states: WireTensor, position: int, row_order: tuple[int, ...] | None, max_tokens: int | None
    ) -> StepReply:
        step = Step(self._state.last_begun + 1, position, hidden_states, row_order, max_tokens)
        self._state.begin_step(step.step_id, position, hidden_states.shape[1])
        self._unanswered = step
        return await self._answer_to(step, is_sent=False)

    async def close(self) -> None:
        """Free the session at the node. Idempotent; a node that cannot be reached frees it after its grace period."""
        was_open = self._state.state is State.OPEN
        self._state.closed()
        stream, self._stream = self._stream, None
        if stream is None:
            return
        try:
            if was_open:
                async with asyncio.timeout(self._limits.open_s):
                    await stream.send(CloseSession())
                    await stream.receive()
        except (SwarmError, TimeoutError) as error:
            logger.debug("close was not confirmed: %s %s", error, self._where)
        finally:
            await stream.close()

    async def _answer_to(self, step: Step, *, is_sent: bool) -> StepReply:
        async with self._deadline(self._limits.step_s, f"step {step.step_id}"):
            while True:
                try:
                    if not is_sent:
                        await self._send(step)
                    return await self._receive_reply(step)
                except StreamLostError as error:
                    logger.info("stream lost (%s), resuming %s", error, self._where)
                    await self._drop()
                    is_sent = await self._resume(step)
                except ProtocolError:
                    if self._unanswered is not None:  # what came is no answer, and nothing behind it can be trusted
                        await self._drop()
                    raise

    async def _send(self, step: Step) -> None:
        if self._stream is None:
            raise StreamLostError(f"no stream to {short_peer(self.hop.peer_id)}")
        sending = asyncio.ensure_future(self._stream.send(step)) if _num_bytes(step) > WATCHED_BYTES else None
        try:
            if sending is None:
                await self._stream.send(step)
                return
            while not (await asyncio.wait([sending], timeout=self._patience_s(step)))[0]:
                if await self._is_replaceable():
                    raise StepTimeoutError(f"{short_peer(self.hop.peer_id)} does not take what is sent to it")
            sending.result()
        except (asyncio.CancelledError, StepTimeoutError):
            if sending is not None:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
            await self._drop()
            raise

    async def _receive_reply(self, step: Step) -> StepReply:
        reply = await self._receive_watched(step)
        match reply:
            case StepReply(step_id=step.step_id):
                found, wanted = reply.hidden_states, step.hidden_states
                if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
                    raise InvalidTensorError(f"the node answered {found} to {wanted}")
                self._state.finish_step(step.step_id)
                self._unanswered = None
                self._reserved_tokens = max(self._reserved_tokens, step.max_tokens or 0)
                return reply
            case ErrorReply(step_id=step.step_id):
                self._state.fail_step(step.step_id)
                self._unanswered = None
                raise error_from_wire(reply.code, reply.message, reply.retryable)
            case ErrorReply():
                raise error_from_wire(reply.code, reply.message, reply.retryable)
        raise UnexpectedMessageError(f"{type(reply).__name__} came, the reply of step {step.step_id} was expected")

    async def _receive_watched(self, step: Step) -> Message:
        """Return the next message. While none comes, ask the node for a sign of life: a prefill may take its time.

        Raises StepTimeoutError if it gives none and could be replaced.
        """
        if self._stream is None:
            raise StreamLostError(f"no stream to {short_peer(self.hop.peer_id)}")
        loop = asyncio.get_running_loop()
        started_s, patience_s = loop.time(), self._patience_s(step)
        is_asked = False
        while True:
            try:
                async with asyncio.timeout(patience_s):
                    message = await self._stream.receive()
            except TimeoutError:
                if is_asked and await self._is_replaceable():
                    raise StepTimeoutError(
                        f"{short_peer(self.hop.peer_id)} gives no sign of life since {loop.time() - started_s:.1f} s"
                    ) from None
                if not is_asked:
                    await self._stream.send(Ping(step.step_id))
                    is_asked = True
                continue
            if not isinstance(message, Pong):
                if step.hidden_states.shape[1] == 1:
                    self._usual_s += 0.2 * (loop.time() - started_s - self._usual_s)
                return message
            is_asked = False

    def _patience_s(self, step: Step) -> float:
        """Return how long a node that is well may be silent, at most, before it is asked."""
        return max(NOTICE_S, 4 * self._usual_s) / 2 + 2 * _num_bytes(step) / SLOWEST_BYTES_PER_S

    async def _drop(self) -> None:
        if self._state.state is State.OPEN:
            self._state.dropped()
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.close()

    async def _resume(self, step: Step) -> bool:
        """Take the session up on a new stream; return whether the node has `step` already."""
        last_error: SwarmError = StreamLostError(f"the stream to {short_peer(self.hop.peer_id)} was lost")
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + self._limits.resume_s
        may_leave = await self._is_replaceable()
        while loop.time() < give_up_s:
            try:
                request = ResumeSession(self._session_id, self._resume_token, self._state.last_finished)
                async with self._deadline(RESUME_TRY_S if may_leave else self._limits.resume_s, "resuming a session"):
                    reply = await self._ask(request)
            except (PeerUnreachableError, StreamLostError, StepTimeoutError) as error:
                last_error = error
                may_leave = await self._is_replaceable()
                if may_leave:
                    break
                await asyncio.sleep(RESUME_PAUSE_S)
                continue
            try:
                if not isinstance(reply, SessionResumed):
                    raise UnexpectedMessageError(f"{type(reply).__name__} came, SessionResumed was expected")
                return step.step_id not in self._state.steps_to_resend(reply.last_step_id)
            except ProtocolError:
                await self._drop()
                raise
        raise StreamLostError(f"the stream to {short_peer(self.hop.peer_id)} was lost: {last_error}")

    async def _ask(self, request: OpenSession | ResumeSession) -> Message:
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
        self._stream = stream
        return reply

    @contextlib.asynccontextmanager
    async def _deadline(self, timeout_s: float, what: str) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError:
            raise StepTimeoutError(
                f"{what} at {short_peer(self.hop.peer_id)} took longer than {timeout_s:g} s"
            ) from None

    @property
    def _where(self) -> str:
        return f"peer={short_peer(self.hop.peer_id)} session={short_id(self._session_id)} blocks={self.hop.span}"
