"""What a node answers on its streams: sessions, and forward passes without one.

What a peer sends falls into three kinds of trouble:

    - a request that cannot be served, or a step that failed: answered with its code, and the stream goes on;
    - a broken rule of the wire, or a message that has no place where it comes: answered, the stream is closed and its
      session ended, since its peer does not speak the protocol;
    - a bug on this side: logged with its traceback and answered as `internal_error`. A step that failed so leaves its
      session usable, unless it permuted the rows of the cache: nobody knows which of them it reached.
"""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from contextlib import ExitStack

from server_node.admission import Admission, SessionPlan
from server_node.compute.work import AllocateWork, ForwardWork, StepWork
from server_node.compute.worker import ComputeWorker
from server_node.link import Link, open_link
from server_node.rates import BROKEN_STREAM
from server_node.sessions import Session, SessionTable
from server_node.speed import SpeedMeter
from swarm_protocol.errors import (
    InternalError,
    LimitExceededError,
    ProtocolError,
    SessionClosedError,
    StreamLostError,
    SwarmError,
    UnexpectedMessageError,
)
from swarm_protocol.ids import PeerId, short_peer
from swarm_protocol.messages import (
    CloseSession,
    ErrorReply,
    Forward,
    ForwardReply,
    Message,
    OpenSession,
    Ping,
    Pong,
    ResumeSession,
    SessionClosed,
    SessionOpened,
    Step,
    StepReply,
    error_reply,
)
from swarm_protocol.session_state import Begun
from swarm_protocol.transport.base import FrameStream

logger = logging.getLogger(__name__)

_GREETING_BYTES = 64 * 1024
"""The payload that is let in before a session is open: none is needed, but a small step shall get a better answer than
that it is too large."""

_MAX_GREETINGS = 32
"""Messages on a stream before its session is there; a probe sends a few pings, a client one opening."""

_FLUSH_S = 5.0
"""For peers to take the last answers when the node leaves; what they do not take, they have to do without."""


class NodeHandlers:
    """The two stream handlers of a node. Steps run in `group`: they outlive their stream."""

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
        self._group = group
        self._speed = speed
        self._links: set[Link] = set()
        self._steps: set[asyncio.Task[None]] = set()
        self._something_ended = asyncio.Event()

    async def serve_session(self, stream: FrameStream) -> None:
        """Serve one stream of SESSION_PROTOCOL; runs until either side ends it."""
        await self._serve(stream, _GREETING_BYTES, self._session_stream)

    async def serve_compute(self, stream: FrameStream) -> None:
        """Serve one stream of COMPUTE_PROTOCOL; runs until either side ends it."""
        await self._serve(stream, self._admission.payload_bytes(), self._compute_stream)

    async def drain(self, timeout_s: float) -> None:
        """Wait for what runs, at most `timeout_s`, then end every session and stream. New work is refused already."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._admission.num_queued:
                    await self._wait_for_an_end()
        except TimeoutError:
            logger.warning("%d steps did not end within %g s and are given up", self._admission.num_queued, timeout_s)
            for step in list(self._steps):
                step.cancel()
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

    async def _serve(
        self, stream: FrameStream, max_payload_bytes: int, conversation: Callable[[Link], Awaitable[None]]
    ) -> None:
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

    async def _converse(self, link: Link, conversation: Callable[[Link], Awaitable[None]], counted: ExitStack) -> None:
        peer = short_peer(link.peer_id)
        try:
            counted.enter_context(self._admission.stream(link.peer_id))
            await conversation(link)
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
            link.post(error_reply(_internal(error, f"bug in a stream's handler peer={peer}")))

    # sessions

    async def _session_stream(self, link: Link) -> None:
        session = await self._greet(link)
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
                raise _internal(error, f"bug while a session was opened {session}") from error
            raise
        self._sessions.opened(session, cache, link)
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
                self._on_step(session, link, message)
            case Ping():
                link.post(Pong(message.nonce))
            case CloseSession():
                self._sessions.close(session)
                await session.released.wait()
                link.post(SessionClosed())
            case _:
                raise UnexpectedMessageError(f"{type(message).__name__} has no place in an open session")

    def _on_step(self, session: Session, link: Link, step: Step) -> None:
        problem = self._admission.step_problem(step, session.plan) or self._refused_extension(session, step)
        num_tokens = 0 if problem else step.hidden_states.shape[1]
        try:
            begun = session.begin_step(step.step_id, step.position, num_tokens, _now_s())
        except SwarmError as error:
            # Nothing has changed, so a peer that knows better can go on.
            logger.debug("step refused: %s: %s %s", error.code, error, session)
            link.post(error_reply(error, step.step_id))
            return
        if begun is Begun.FINISHED:
            link.post(session.reply_of(step.step_id))
        if begun is not Begun.NEW:
            return
        # From here on the step counts as begun, with an error as its reply if need be: the asking side counts it too.
        try:
            if problem is not None:
                raise problem
            self._admission.queue(session.plan.peer_id)
        except SwarmError as error:
            logger.debug("step refused: %s: %s %s", error.code, error, session)
            session.answer(step.step_id, error_reply(error, step.step_id))
            return
        session.num_running += 1
        task = self._group.create_task(self._run_step(session, step), name="step")
        self._steps.add(task)
        task.add_done_callback(self._steps.discard)

    def _refused_extension(self, session: Session, step: Step) -> SwarmError | None:
        """Extend a session as a new step wishes; return why that cannot be."""
        if step.max_tokens is None or not session.state.is_next(step.step_id):
            return None
        try:
            self._sessions.extend(session, step.max_tokens)
        except SwarmError as error:
            return error
        return None

    async def _run_step(self, session: Session, step: Step) -> None:
        """Run a step and answer it, on whatever stream the session is by then."""
        reply: StepReply | ErrorReply
        is_broken = False
        try:
            output = await self._worker.run(
                StepWork(
                    session.cache,
                    session.plan.blocks,
                    step.position,
                    step.hidden_states,
                    step.row_order,
                    session.plan.max_tokens,
                    owner=session.plan.peer_id,
                )
            )
            if math.prod(output.hidden_states.shape):
                self._admission.rates.computed(session.plan.peer_id, _now_s())
            self._speed.ran(output, len(session.plan.blocks), _now_s())
            reply = StepReply(step.step_id, output.hidden_states, output.queue_s, output.compute_s)
            logger.debug("step %d of %s in %.4f s %s", step.step_id, output.hidden_states, output.compute_s, session)
        except SwarmError as error:
            logger.debug("step failed: %s: %s %s", error.code, error, session)
            reply = error_reply(error, step.step_id)
        except Exception as error:
            reply = error_reply(_internal(error, f"bug in a step {session}"), step.step_id)
            is_broken = step.row_order is not None
        finally:
            self._work_ended(session.plan.peer_id)
            self._sessions.step_ended(session)
        if not session.is_closed:
            session.answer(step.step_id, reply)
        if is_broken:
            link = session.link
            self._sessions.close(session)
            if link is not None:
                link.finish()

    def _work_ended(self, peer_id: PeerId) -> None:
        self._admission.unqueue(peer_id)
        self._something_ended.set()

    # forward passes

    async def _compute_stream(self, link: Link) -> None:
        while True:
            message = await link.receive(_now_s() + self._admission.limits.idle_s)
            if isinstance(message, Forward):
                link.post(await self._forward(link, message))
                await link.all_sent()  # or a peer that reads nothing would pile up outputs here
            elif isinstance(message, Ping):
                link.post(Pong(message.nonce))
            else:
                raise UnexpectedMessageError(f"{type(message).__name__} has no place on a stream for forward passes")

    async def _forward(self, link: Link, request: Forward) -> ForwardReply | ErrorReply:
        try:
            blocks = self._admission.check_forward(request)
            self._admission.queue(link.peer_id)
            try:
                output = await self._worker.run(ForwardWork(blocks, request.hidden_states, link.peer_id))
            finally:
                self._work_ended(link.peer_id)
        except SwarmError as error:
            logger.debug("forward refused: %s: %s peer=%s", error.code, error, short_peer(link.peer_id))
            return error_reply(error, request.request_id)
        except Exception as error:
            bug = _internal(error, f"bug in a forward pass peer={short_peer(link.peer_id)}")
            return error_reply(bug, request.request_id)
        self._admission.rates.computed(link.peer_id, _now_s())
        return ForwardReply(request.request_id, output.hidden_states)


def _allocation(request: OpenSession, plan: SessionPlan) -> AllocateWork:
    # A prefix says what the tokens of one row will be.
    prefix = request.prefix if plan.batch_size == 1 else ()
    return AllocateWork(plan.blocks, plan.batch_size, plan.max_tokens, plan.peer_id, prefix)


def _internal(error: Exception, what: str) -> InternalError:
    logger.error("%s", what, exc_info=error)
    return InternalError("internal error, see the log of the node")


def _now_s() -> float:
    return asyncio.get_running_loop().time()
