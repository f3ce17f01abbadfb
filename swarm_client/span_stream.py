"""One hop of a session: the client's end of the stream to one node. Belongs to the event loop.

A step is *planned*, which gives it its number at the node; it *begins* when the node has it or is about to get it, from
this client or from the node before; and it ends with a reply, which is kept with it. A number that was told to anybody
stands for that step only: a step whose way is uncertain is completed under its number, by whoever has its input.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace

from swarm_client.node_line import HopLimits, NodeLine
from swarm_client.reservation import tokens_to_reserve
from swarm_client.routing.find_route import Hop, ModelKey
from swarm_client.sent import Sent
from swarm_protocol.errors import (
    InvalidTensorError,
    PeerUnreachableError,
    ProtocolError,
    StepOrderError,
    StepTimeoutError,
    StreamLostError,
    SwarmError,
    UnexpectedMessageError,
    UnsupportedVersionError,
    error_from_wire,
)
from swarm_protocol.ids import PeerId, short_id, short_peer
from swarm_protocol.messages import (
    MAX_IN_FLIGHT,
    PAGE_TOKENS,
    PROTOCOL_VERSIONS,
    CloseSession,
    Draining,
    ErrorReply,
    Message,
    Onward,
    OpenSession,
    ResumeSession,
    SendTape,
    SessionClosed,
    SessionOpened,
    SessionResumed,
    Step,
    StepReply,
    TapeSent,
    WireTensor,
)
from swarm_protocol.session_state import SessionState, State
from swarm_protocol.transport.base import Transport

logger = logging.getLogger(__name__)

RESUME_PAUSE_S = 0.3
"""Between two tries to take a dropped stream up again: a node that restarts its stream listener needs about as long."""

RESUME_TRY_S = 1.0
"""For the first try where another node could do the work: a node that is well answers sooner."""

_REQUESTS = 1 << 60
"""Where the numbers of what is asked besides steps begin."""


class SpanStream:
    """A session's stream to the node that runs `hop.span`; taken up again when it drops. One task may wait on it.

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
        self._limits = limits
        self._session_id = session_id
        self._state = SessionState(max_length, MAX_IN_FLIGHT)
        self._line = NodeLine(transport, hop, self._state, limits, is_replaceable)
        self._resume_token = b""
        self._planned: deque[Sent] = deque()
        self._open: deque[Sent] = deque()
        self._asked: Sent | None = None
        self._num_requests = 0
        self._reserved_tokens = 0

    async def open(
        self,
        model: ModelKey,
        batch_size: int,
        reserve_tokens: int,
        prefix: tuple[bytes, ...] = (),
        *,
        upstream: PeerId | None = None,
        downstream: PeerId | None = None,
    ) -> int:
        """Reserve the session at the node; return how many tokens of `prefix`, hashes of pages, are cached there.

        `upstream` and `downstream` are the nodes before and behind on the ring. Raises SwarmError: what the node
        answered, or why it cannot be reached.
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
            upstream,
            downstream,
            prefix,
        )
        async with self._line.deadline(self._limits.open_s, "opening a session"):
            reply = await self._line.ask(request)
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

    # the life of a step

    @property
    def is_settled(self) -> bool:
        """Whether nothing is planned or unanswered."""
        return not self._planned and not self._open

    def plan(self, shape: tuple[int, ...], dtype: str, position: int, row_order: tuple[int, ...] | None = None) -> Sent:
        """Give the next number to a step of (batch, seq, hidden) values; it extends the reservation if need be."""
        needed, max_tokens = position + shape[1], None
        if needed > self._reserved_tokens:
            wished = tokens_to_reserve(needed, self._limits.reserve_tokens, self._state.max_length)
            max_tokens = max(needed, wished)
        step_id = self._state.last_begun + len(self._planned) + 1
        self._planned.append(sent := Sent(step_id, position, shape, dtype, row_order, max_tokens))
        return sent

    def forget(self, sent: Sent) -> None:
        """Take back the step that was planned last: nobody was told its number, or nobody will use it."""
        if self._planned and self._planned[-1] is sent:
            self._planned.pop()

    def onward(self, sent: Sent) -> Onward:
        """Return what the node before is told, to send a step on to here."""
        sent.may_go_on = True
        return Onward(self.hop.peer_id, self._session_id, sent.step_id, sent.max_tokens)

    async def send(
        self,
        sent: Sent,
        states: WireTensor,
        onward: tuple[Onward, ...] = (),
        *,
        wants_output: bool = True,
        upstream: PeerId | None = None,
    ) -> None:
        """Send a step, to the node and `onward`, or send it again, wherever it was before.

        If it had arrived, its output comes back, whether it had gone on or not. Raises SwarmError.
        """
        await self._begin(sent)
        is_there = sent.message is not None and sent.sent_on is not None and sent.sent_on is self._line.stream
        if is_there and sent.message is not None and not sent.message.onward and sent.message.wants_output:
            return  # its output is on its way
        sent.may_go_on |= bool(onward) or not wants_output
        message = sent.message = Step(
            sent.step_id, sent.position, states, sent.row_order, sent.max_tokens, onward, wants_output, upstream
        )
        try:
            await self._line.send(replace(message, hidden_states=_nothing(sent)) if is_there else message, sent)
            sent.sent_on = self._line.stream
        except StreamLostError as error:
            logger.info("stream lost (%s) %s", error, self._where)
            await self._line.drop()  # `reply` takes it up again

    async def reply(self, sent: Sent, *, is_brought: bool = False) -> StepReply:
        """Return the reply to a step, which other nodes bring if `is_brought`. A dropped stream is taken up again.

        Raises SwarmError: the node's own, NotBroughtError if the step does not arrive there; a retryable one leaves
        the session usable only if this hop is replaced.
        """
        await self._begin(sent)
        await self._wait(sent, is_brought=is_brought)
        assert sent.reply is not None
        return sent.reply

    async def output(self, sent: Sent) -> WireTensor:
        """Return the output of the last step that was answered, from the node if it had gone on from there."""
        assert sent.reply is not None
        if sent.reply.hidden_states.shape == sent.shape:
            return sent.reply.hidden_states
        again = Sent(sent.step_id, sent.position, sent.shape, sent.dtype, None, None, has_begun=True)
        return await self._answer_to(Step(sent.step_id, sent.position, _nothing(sent)), again)

    async def send_tape(
        self, start: int, end: int, shape: tuple[int, ...], dtype: str, onward: tuple[Onward, ...] = ()
    ) -> WireTensor:
        """Let the node send on again what it put out, of `shape`; return it if it did not go `onward`.

        Raises TapeLostError if the node does not have it any more, and other SwarmErrors.
        """
        self._num_requests += 1
        asked = Sent(_REQUESTS + self._num_requests, start, shape, dtype, None, None, has_begun=True)
        asked.may_go_on = bool(onward)
        return await self._answer_to(SendTape(asked.step_id, start, end, onward), asked)

    @property
    def credentials(self) -> tuple[bytes, bytes]:
        """The session's id and what proves that it is ours."""
        return self._session_id, self._resume_token

    def on_draining(self, tell: Callable[[Draining], None]) -> None:
        """Let `tell` be called when the node says that it leaves."""
        self._line.on_draining = tell

    async def listen(self) -> None:
        """Take what the node says of itself until the stream ends; while no step runs: cancel it before one does."""
        if self.is_settled and self._asked is None:
            await self._line.listen()

    def filled(self, position: int) -> None:
        """The node says that it has copied so many tokens from another one.

        Raises UnexpectedMessageError if they are more than it has reserved, or a step was begun.
        """
        if position > self._reserved_tokens:
            raise UnexpectedMessageError(f"{position} tokens were copied, they say, where {self._reserved_tokens} fit")
        self._state.filled(position)

    async def close(self) -> None:
        """Free the session at the node. Idempotent; a node that cannot be reached frees it after its grace period."""
        was_open = self._state.state is State.OPEN
        self._state.closed()
        stream, self._line.stream = self._line.stream, None
        if stream is None:
            return
        try:
            if was_open:
                async with asyncio.timeout(self._limits.open_s):
                    await stream.send(CloseSession())
                    while not isinstance(await stream.receive(), SessionClosed):
                        pass
        except (SwarmError, TimeoutError) as error:
            logger.debug("close was not confirmed: %s %s", error, self._where)
        finally:
            await stream.close()

    async def _answer_to(self, message: Step | SendTape, asked: Sent) -> WireTensor:
        self._asked = asked
        try:
            await self._wait(asked, question=message)
        finally:
            self._asked = None
        assert asked.reply is not None
        return asked.reply.hidden_states

    async def _wait(self, sent: Sent, *, question: Step | SendTape | None = None, is_brought: bool = False) -> None:
        """Wait for an answer, and ask `question` before that, and again on every stream that replaces a dropped one."""
        is_asked = question is None
        async with self._line.deadline(self._limits.step_s, f"step {sent.step_id}"):
            while not sent.is_answered:
                try:
                    if question is not None and not is_asked:
                        await self._line.send(question, sent)
                        is_asked = True
                    self._take(await self._line.receive(sent, is_brought=is_brought))
                except StreamLostError as error:
                    logger.info("stream lost (%s), resuming %s", error, self._where)
                    await self._line.drop()
                    await self._resume()
                    is_asked = question is None
                except ProtocolError:
                    await self._line.drop()  # what came is no answer, and nothing behind it can be trusted
                    raise
        if sent.error is not None:
            raise sent.error

    async def _begin(self, sent: Sent) -> None:
        if not sent.has_begun and self._line.stream is None and self._state.state is State.DETACHED:
            await self._resume()
        if sent.has_begun:  # the resume may have found out
            return
        if not self._planned or self._planned[0] is not sent:
            raise StepOrderError(f"step {sent.step_id} is not the next one")
        self._start(sent)

    def _start(self, sent: Sent) -> None:
        self._state.begin_step(sent.step_id, sent.position, sent.shape[1])
        self._planned.popleft()
        sent.has_begun = True
        self._open.append(sent)

    def _take(self, message: Message) -> None:
        """Put a reply to the step or question that it belongs to. Raises ProtocolError if it belongs to none."""
        match message:
            case StepReply() | TapeSent():
                number = message.step_id if isinstance(message, StepReply) else message.request_id
                times_s = (message.queue_s, message.compute_s) if isinstance(message, StepReply) else (0.0, 0.0)
                sent = self._awaited(number)
                if sent is None:
                    return  # of a step that was completed in another way, too
                found = message.hidden_states
                is_there = found.shape == sent.shape
                is_away = found.shape == (sent.shape[0], 0, *sent.shape[2:]) and sent.may_go_on
                if found.dtype != sent.dtype or not (is_there or is_away):
                    raise InvalidTensorError(f"the node answered {found} to {sent.dtype} of shape {sent.shape}")
                if sent in self._open:
                    self._state.finish_step(number)
                    self._open.popleft()
                    self._reserved_tokens = max(self._reserved_tokens, sent.max_tokens or 0)
                sent.reply = StepReply(number, found, *times_s)
            case ErrorReply(step_id=int(number)):
                sent = self._awaited(number)
                if sent is None:
                    return
                if sent in self._open:
                    self._state.fail_step(number)
                    self._open.popleft()
                sent.error = error_from_wire(message.code, message.message, message.retryable)
            case ErrorReply():
                raise error_from_wire(message.code, message.message, message.retryable)
            case _:
                raise UnexpectedMessageError(f"{type(message).__name__} came, a reply was expected")

    def _awaited(self, number: int) -> Sent | None:
        """Return what waits for the answer with this number; None if it was answered before."""
        if self._asked is not None and self._asked.step_id == number:
            return self._asked
        if self._open and self._open[0].step_id == number:
            return self._open[0]
        if number <= self._state.last_finished or _REQUESTS < number <= _REQUESTS + self._num_requests:
            return None
        raise StepOrderError(f"an answer to {number} came, which is not awaited")

    async def _resume(self) -> None:
        """Take the session up on a new stream, and send again what this client had sent and the node has not got."""
        last_error: SwarmError = StreamLostError(f"the stream to {short_peer(self.hop.peer_id)} was lost")
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + self._limits.resume_s
        may_leave = await self._line.is_replaceable()
        while loop.time() < give_up_s:
            try:
                request = ResumeSession(self._session_id, self._resume_token, self._state.last_finished)
                async with self._line.deadline(
                    RESUME_TRY_S if may_leave else self._limits.resume_s, "resuming a session"
                ):
                    reply = await self._line.ask(request)
            except (PeerUnreachableError, StreamLostError, StepTimeoutError) as error:
                last_error = error
                may_leave = await self._line.is_replaceable()
                if may_leave:
                    break
                await asyncio.sleep(RESUME_PAUSE_S)
                continue
            try:
                if not isinstance(reply, SessionResumed):
                    raise UnexpectedMessageError(f"{type(reply).__name__} came, SessionResumed was expected")
                lacking = self._resumed(reply.last_step_id)
            except ProtocolError:
                await self._line.drop()
                raise
            for sent in self._open:
                if sent.step_id in lacking and sent.message is not None:
                    await self._line.send(sent.message, sent)
                sent.sent_on = self._line.stream
            return
        raise StreamLostError(f"the stream to {short_peer(self.hop.peer_id)} was lost: {last_error}")

    def _resumed(self, last_begun: int) -> range:
        """Begin the planned steps that others have brought up to `last_begun`; return the steps to send again."""
        brought = [sent for sent in self._planned if sent.may_go_on and sent.step_id <= last_begun]
        lacking = self._state.steps_to_resend(last_begun - len(brought))
        for sent in brought:
            self._start(sent)
        return lacking

    @property
    def _where(self) -> str:
        return f"peer={short_peer(self.hop.peer_id)} session={short_id(self._session_id)} blocks={self.hop.span}"


def _nothing(sent: Sent) -> WireTensor:
    return WireTensor(sent.dtype, (sent.shape[0], 0, *sent.shape[2:]), b"")
