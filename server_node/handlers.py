"""What a node answers on its streams: sessions, and passes forward and back without one.

What a peer sends falls into three kinds of trouble:

    - a request that cannot be served, or a step that failed: answered with its code, and the stream goes on;
    - a broken rule of the wire, or a message that has no place where it comes: answered, the stream is closed and its
      session ended, since its peer does not speak the protocol;
    - a bug on this side: logged with its traceback and answered as `internal_error`. A step that failed so leaves its
      session usable, unless it permuted the rows of the cache: nobody knows which of them it reached.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import ExitStack

from server_node.admission import Admission, SessionPlan
from server_node.compute.work import AllocateWork, BackwardWork, ForwardWork
from server_node.compute.worker import ComputeWorker
from server_node.link import Link, open_link
from server_node.rates import BROKEN_STREAM
from server_node.sessions import Session, SessionTable
from server_node.speed import SpeedMeter
from server_node.steps import StepRunner, internal_error
from swarm_protocol.errors import (
    LimitExceededError,
    ProtocolError,
    SessionClosedError,
    StreamLostError,
    SwarmError,
    UnexpectedMessageError,
)
from swarm_protocol.ids import PeerId, short_peer
from swarm_protocol.messages import (
    Backward,
    BackwardReply,
    CloseSession,
    Draining,
    ErrorReply,
    Forward,
    ForwardReply,
    JoinSession,
    Message,
    OpenSession,
    Ping,
    Pong,
    ResumeSession,
    RingJoined,
    SendTape,
    SessionClosed,
    SessionOpened,
    Step,
    error_reply,
)
from swarm_protocol.spans import Span
from swarm_protocol.transport.base import FrameStream

logger = logging.getLogger(__name__)

_GREETING_BYTES = 64 * 1024
"""The payload that is let in before a session is open: none is needed, but a small step shall get a better answer than
that it is too large."""

_MAX_GREETINGS = 32
"""Messages on a stream before its session is there; a probe sends a few pings, a client one opening."""

_MAX_USELESS = 8
"""Steps in a row that another node brings and that do not run: they cost the client whose session it is. A few come
when the client has brought them itself."""

_FLUSH_S = 5.0
"""For peers to take the last answers when the node leaves; what they do not take, they have to do without."""


Conversation = Callable[[Link, ExitStack], Awaitable[None]]
"""Serves one stream; it is counted, for its peer, in the stack."""


class NodeHandlers:
    """The stream handlers of a node. Steps run in `group`: they outlive their stream."""

    def __init__(
        self,
        admission: Admission,
        sessions: SessionTable,
        worker: ComputeWorker,
        group: asyncio.TaskGroup,
        speed: SpeedMeter,
    ) -> None:
        self._admission = admission
        self._sessions = sessions
        self._worker = worker
        self._links: set[Link] = set()
        self._something_ended = asyncio.Event()
        self._speed = speed
        self._steps = StepRunner(admission, sessions, worker, group, speed, self._something_ended.set)

    async def serve_session(self, stream: FrameStream) -> None:
        """Serve one stream of SESSION_PROTOCOL; runs until either side ends it."""
        await self._serve(stream, _GREETING_BYTES, self._session_stream)

    async def serve_ring(self, stream: FrameStream) -> None:
        """Serve one stream of RING_PROTOCOL; runs until either side ends it."""
        await self._serve(stream, _GREETING_BYTES, self._ring_stream)

    async def serve_compute(self, stream: FrameStream) -> None:
        """Serve one stream of COMPUTE_PROTOCOL; runs until either side ends it."""
        await self._serve(stream, self._admission.pass_bytes(), self._compute_stream)

    async def serve_with(self, stream: FrameStream, conversation: Conversation) -> None:
        """Serve a stream of another protocol, whose messages `conversation` takes, within the same limits."""
        await self._serve(stream, _GREETING_BYTES, conversation)

    async def drain(self, timeout_s: float) -> None:
        """Take no more steps; wait for what runs, at most `timeout_s`, then end every session and stream."""
        self._admission.has_left = True
        try:
            async with asyncio.timeout(timeout_s):
                while self._admission.num_queued:
                    await self._wait_for_an_end()
        except TimeoutError:
            logger.warning("%d steps did not end within %g s and are given up", self._admission.num_queued, timeout_s)
            self._steps.cancel_all()
        for link in self._links:
            link.finish()
        try:
            async with asyncio.timeout(_FLUSH_S):
                while self._links:
                    await self._wait_for_an_end()
        except TimeoutError:
            logger.info("%d streams did not take their last answers", len(self._links))
            await asyncio.gather(*(link.abort() for link in list(self._links)))
        self._sessions.close_all()

    async def _wait_for_an_end(self) -> None:
        self._something_ended.clear()
        await self._something_ended.wait()

    async def _serve(self, stream: FrameStream, max_payload_bytes: int, conversation: Conversation) -> None:
        if self._admission.is_flooding(stream.peer_id, _now_s()):
            # Not even an answer: each would cost as much as what the limits spare.
            return
        link = Link(stream, self._admission, max_payload_bytes)
        self._links.add(link)
        try:
            # It counts until its last answers are sent, too: they are what a peer that does not read piles up.
            with ExitStack() as counted:
                async with open_link(link):
                    await self._converse(link, conversation, counted)
        except Exception:
            logger.exception("bug while a stream was ended peer=%s", short_peer(stream.peer_id))
        finally:
            self._links.discard(link)
            self._something_ended.set()

    async def _converse(self, link: Link, conversation: Conversation, counted: ExitStack) -> None:
        peer = short_peer(link.peer_id)
        try:
            counted.enter_context(self._admission.stream(link.peer_id))
            await conversation(link, counted)
        except StreamLostError as error:
            logger.debug("stream ended: %s peer=%s", error, peer)
        except TimeoutError:
            logger.debug("stream closed, nothing came peer=%s", peer)
        except SwarmError as error:
            logger.debug("stream refused: %s: %s peer=%s", error.code, error, peer)
            if isinstance(error, ProtocolError):
                self._admission.rates.message(link.peer_id, _now_s(), BROKEN_STREAM)
            link.post(error_reply(error))
        except Exception as error:
            link.post(error_reply(internal_error(error, f"bug in a stream's handler peer={peer}")))

    # sessions

    async def _session_stream(self, link: Link, _: ExitStack) -> None:
        session = await self._greet(link)
        if self._admission.leaves_at_s is not None:  # it was said on the stream that dropped, or not at all
            link.post(Draining(max(0.0, self._admission.leaves_at_s - _now_s())))
        link.allow_payload(self._admission.payload_bytes(session.plan))
        try:
            while session.link is link and not session.is_closed:
                message = await self._next_message(session, link)
                if message is not None and session.link is link:
                    await self._on_session_message(session, link, message)
        except (ProtocolError, SessionClosedError):
            if session.link is link:
                self._sessions.close(session)
            raise
        finally:
            self._sessions.detach(session, link)

    async def _greet(self, link: Link) -> Session:
        """Return the session that the stream opens or resumes. A refusal is answered, and other tries may follow."""
        for _ in range(_MAX_GREETINGS):
            message = await link.receive(_now_s() + self._admission.limits.first_message_s)
            try:
                if isinstance(message, OpenSession):
                    return await self._open(message, link)
                if isinstance(message, ResumeSession):
                    return await self._sessions.resume(message, link)
            except ProtocolError:
                raise
            except SwarmError as error:
                logger.info("session refused: %s: %s peer=%s", error.code, error, short_peer(link.peer_id))
                self._speed.served.failed(error.code)
                link.post(error_reply(error))
                continue
            if not isinstance(message, Ping):
                raise UnexpectedMessageError(f"{type(message).__name__} came before a session was opened or resumed")
            link.post(Pong(message.nonce))
        raise LimitExceededError(f"no session after {_MAX_GREETINGS} messages: dial again")

    async def _open(self, request: OpenSession, link: Link) -> Session:
        session = self._sessions.add(self._admission.admit(request, link.peer_id))
        plan = session.plan
        try:
            cache = await self._worker.run(_allocation(request, plan))
        except BaseException as error:
            self._sessions.close(session)
            if isinstance(error, Exception) and not isinstance(error, SwarmError):
                raise internal_error(error, f"bug while a session was opened {session}") from error
            raise
        self._sessions.opened(session, cache, request.prefix if plan.batch_size == 1 else (), link)
        grace_s = self._admission.limits.resume_grace_s
        link.post(SessionOpened(plan.version, session.resume_token, grace_s, session.state.position))
        return session

    async def _next_message(self, session: Session, link: Link) -> Message | None:
        """Return what comes next; None if nothing came, but the session is not idle either."""
        idle_s = self._admission.limits.idle_s
        since_s = _now_s() if session.num_running else session.active_s
        try:
            return await link.receive(since_s + idle_s)
        except TimeoutError:
            if session.num_running or session.active_s + idle_s > _now_s():
                return None
            raise SessionClosedError(f"no step came in {idle_s:g} s: the session was closed") from None

    async def _on_session_message(self, session: Session, link: Link, message: Message) -> None:
        match message:
            case Step():
                self._steps.on_step(session, message)
            case Ping():
                link.post(Pong(message.nonce, session.state.last_begun))
            case SendTape():
                self._steps.on_send_tape(session, message)
            case CloseSession():
                self._sessions.close(session)
                await session.released.wait()
                link.post(SessionClosed())
            case _:
                raise UnexpectedMessageError(f"{type(message).__name__} has no place in an open session")

    async def _ring_stream(self, link: Link, counted: ExitStack) -> None:
        message = await link.receive(_now_s() + self._admission.limits.first_message_s)
        if not isinstance(message, JoinSession):
            raise UnexpectedMessageError(f"{type(message).__name__} came, JoinSession was expected")
        session = self._sessions.joined(message, link)
        try:
            # What another node brings counts for the peer whose session it is.
            counted.close()
            counted.enter_context(self._admission.stream(session.plan.peer_id))
            link.charge(session.plan.peer_id)
            link.allow_payload(self._admission.payload_bytes(session.plan))
            link.post(RingJoined())
            num_useless = 0
            while session.upstream_link is link and not session.is_closed:
                if num_useless > _MAX_USELESS:
                    raise LimitExceededError(f"{num_useless} steps came that have no place in the session")
                message = await link.receive(None)
                if not isinstance(message, Step):
                    raise UnexpectedMessageError(f"{type(message).__name__} has no place on a ring")
                if session.upstream_link is link:
                    num_useless = 0 if self._steps.on_ring_step(session, message) else num_useless + 1
        finally:
            if session.upstream_link is link:
                session.upstream_link = None

    # passes without a session

    async def _compute_stream(self, link: Link, _: ExitStack) -> None:
        while True:
            message = await link.receive(_now_s() + self._admission.limits.idle_s)
            if isinstance(message, Forward | Backward):
                link.post(await self._pass(link, message))
                await link.all_sent()  # or a peer that reads nothing would pile up outputs here
            elif isinstance(message, Ping):
                link.post(Pong(message.nonce))
            else:
                raise UnexpectedMessageError(
                    f"{type(message).__name__} has no place on a stream for passes without a session"
                )

    async def _pass(self, link: Link, request: Forward | Backward) -> ForwardReply | BackwardReply | ErrorReply:
        try:
            blocks = self._admission.check_pass(request)
            self._admission.queue(link.peer_id)
            try:
                output = await self._worker.run(_work(request, blocks, link.peer_id))
            finally:
                self._admission.unqueue(link.peer_id)
                self._something_ended.set()
        except SwarmError as error:
            logger.debug("pass refused: %s: %s peer=%s", error.code, error, short_peer(link.peer_id))
            return error_reply(error, request.request_id)
        except Exception as error:
            bug = internal_error(error, f"bug in a pass without a session peer={short_peer(link.peer_id)}")
            return error_reply(bug, request.request_id)
        self._admission.rates.computed(link.peer_id, _now_s())
        reply = ForwardReply if isinstance(request, Forward) else BackwardReply
        return reply(request.request_id, output.hidden_states)


def _allocation(request: OpenSession, plan: SessionPlan) -> AllocateWork:
    # A prefix says what the tokens of one row will be.
    prefix = request.prefix if plan.batch_size == 1 else ()
    return AllocateWork(plan.blocks, plan.batch_size, plan.max_tokens, plan.peer_id, prefix)


def _work(request: Forward | Backward, blocks: Span, owner: PeerId) -> ForwardWork | BackwardWork:
    if isinstance(request, Forward):
        return ForwardWork(blocks, request.hidden_states, owner)
    return BackwardWork(blocks, request.hidden_states, request.gradients, owner)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
