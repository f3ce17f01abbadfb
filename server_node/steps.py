"""The steps of sessions: whether one is to run, where its output goes, and what is sent on again.

A step comes from the session's client, or from the node before it on the ring. Its output goes to the client, or on to
the next node, and then the client hears that it did; where the next node cannot be reached the client gets it instead.
Whatever happens to the streams, a step is answered once it was begun, and the answer is kept for a resume.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine
from typing import Any

from server_node.admission import Admission
from server_node.compute.work import Computed, StepWork
from server_node.compute.worker import ComputeWorker
from server_node.sessions import Session, SessionTable
from server_node.speed import SpeedMeter
from swarm_protocol.errors import InternalError, InvalidRequestError, SessionClosedError, SwarmError, TapeLostError
from swarm_protocol.messages import ErrorReply, SendTape, Step, StepReply, TapeSent, WireTensor, error_reply
from swarm_protocol.session_state import Begun

logger = logging.getLogger(__name__)


class StepRunner:
    """Runs steps in `group`: they outlive the stream that they came on. `on_end` hears whenever one has ended."""

    def __init__(
        self,
        admission: Admission,
        sessions: SessionTable,
        worker: ComputeWorker,
        group: asyncio.TaskGroup,
        speed: SpeedMeter,
        on_end: Callable[[], None],
    ) -> None:
        self._admission = admission
        self._sessions = sessions
        self._worker = worker
        self._group = group
        self._speed = speed
        self._on_end = on_end
        self._tasks: set[asyncio.Task[None]] = set()

    def cancel_all(self) -> None:
        """Give up what runs."""
        for task in list(self._tasks):
            task.cancel()

    def on_step(self, session: Session, step: Step) -> None:
        """Take a step from the session's client."""
        if step.upstream is not None:
            session.takes_from(step.upstream)
        begun = self._begin(session, step)
        if begun is Begun.FINISHED:
            _post(session, session.reply_of(step.step_id))
        elif begun is Begun.RUNNING:
            session.want_back(step.step_id)

    def on_ring_step(self, session: Session, step: Step) -> bool:
        """Take a step from the node before. One that has come already, from there or the client, is passed over.

        So is one that comes before its turn: the one before it was lost on the way, the client brings both. Returns
        whether it runs.
        """
        is_next = session.state.is_next(step.step_id)
        return is_next and self._begin(session, step, is_told=False) is Begun.NEW

    def on_send_tape(self, session: Session, request: SendTape) -> None:
        """Send on again what was sent on before."""
        try:
            self._admission.queue(session.plan.peer_id)
        except SwarmError as error:
            _post(session, error_reply(error, request.request_id))
            return
        self._start(session, self._send_tape(session, request))

    def _begin(self, session: Session, step: Step, *, is_told: bool = True) -> Begun | None:
        """Run a step if it is new. None if it was refused, and then its client is told, or finds out by itself."""
        problem = self._admission.step_problem(step, session.plan) or self._refused_extension(session, step)
        num_tokens = 0 if problem else step.hidden_states.shape[1]
        try:
            begun = session.begin_step(step.step_id, step.position, num_tokens, _now_s())
        except SwarmError as error:
            # Nothing has changed, so a peer that knows better can go on.
            logger.debug("step refused: %s: %s %s", error.code, error, session)
            if is_told:
                _post(session, error_reply(error, step.step_id))
            return None
        if begun is not Begun.NEW:
            return begun
        # From here on the step counts as begun, with an error as its reply if need be: the asking side counts it too.
        try:
            if problem is None:
                self._admission.queue(session.plan.peer_id)
        except SwarmError as error:
            problem = error
        if problem is not None:
            self._speed.served.failed(problem.code)
        if problem is None:
            self._start(session, self._run(session, step))
        elif session.num_running:  # those before it are answered first
            self._admission.queue_anyway(session.plan.peer_id)
            self._start(session, self._refuse(session, step, problem))
        else:
            logger.debug("step refused: %s: %s %s", problem.code, problem, session)
            session.answer(step.step_id, error_reply(problem, step.step_id))
        return begun

    def _refused_extension(self, session: Session, step: Step) -> SwarmError | None:
        """Extend a session as a new step wishes; return why that cannot be."""
        if step.max_tokens is None or not session.state.is_next(step.step_id, step.position):
            return None
        try:
            self._sessions.extend(session, step.max_tokens)
        except SwarmError as error:
            return error
        return None

    def _start(self, session: Session, work: Coroutine[Any, Any, None]) -> None:
        session.num_running += 1
        task = self._group.create_task(work, name="step")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _ended(self, session: Session) -> None:
        self._admission.unqueue(session.plan.peer_id)
        self._sessions.step_ended(session)
        self._on_end()

    async def _run(self, session: Session, step: Step) -> None:
        """Run a step, send its output on, and answer it, on whatever stream the session is by then."""
        is_broken = False
        try:
            reply: StepReply | ErrorReply
            try:
                async with session.turn:
                    output = await self._compute(session, step)
                reply = StepReply(step.step_id, output.hidden_states, output.queue_s, output.compute_s)
            except SwarmError as error:
                logger.debug("step failed: %s: %s %s", error.code, error, session)
                reply = error_reply(error, step.step_id)
            except Exception as error:
                reply = error_reply(internal_error(error, f"bug in a step {session}"), step.step_id)
                is_broken = step.row_order is not None
            if isinstance(reply, ErrorReply):
                self._speed.served.failed(reply.code)
            async with session.sending:
                sent = await self._sent_on(session, step, reply)
                if not session.is_closed:
                    session.answer(step.step_id, reply, sent)
        finally:
            self._ended(session)
        if is_broken:
            link = session.link
            self._sessions.close(session)
            if link is not None:
                link.finish()

    async def _compute(self, session: Session, step: Step) -> Computed:
        if session.is_closed:
            raise SessionClosedError("the session was closed")
        plan = session.plan
        work = StepWork(
            session.cache,
            plan.blocks,
            step.position,
            step.hidden_states,
            step.row_order,
            plan.max_tokens,
            owner=plan.peer_id,
        )
        output = await self._worker.run(work)
        if math.prod(output.hidden_states.shape):
            self._admission.rates.computed(plan.peer_id, _now_s())
        self._speed.ran(output, len(plan.blocks), _now_s())
        num_rows, num_tokens, _ = output.hidden_states.shape
        self._speed.served.computed(num_rows * num_tokens, output.queue_s, _now_s())
        if not session.is_closed:
            session.record(step, output.hidden_states)
        logger.debug("step %d of %s in %.4f s %s", step.step_id, output.hidden_states, output.compute_s, session)
        return output

    async def _sent_on(self, session: Session, step: Step, reply: StepReply | ErrorReply) -> StepReply | None:
        """Send the output where the step says; return what the client is told instead of it, if it is not to get it."""
        if isinstance(reply, ErrorReply) or session.is_closed:
            return None
        if not step.onward:
            return None if step.wants_output else _without_output(reply)
        if session.is_wanted_back(step.step_id) or not await _pushed(session, step, reply.hidden_states):
            return None
        return None if session.is_wanted_back(step.step_id) else _without_output(reply)

    async def _refuse(self, session: Session, step: Step, problem: SwarmError) -> None:
        try:
            async with session.turn:
                pass
            async with session.sending:
                if not session.is_closed:
                    session.answer(step.step_id, error_reply(problem, step.step_id))
        finally:
            self._ended(session)

    async def _send_tape(self, session: Session, request: SendTape) -> None:
        answer: TapeSent | ErrorReply
        try:
            states = self._from_tape(session, request)
            if request.onward:
                step = Step(1, request.start, states, onward=request.onward, wants_output=False)
                async with session.sending:
                    is_sent = not session.is_closed and await _pushed(session, step, states)
                states = _empty_like(states) if is_sent else states
            answer = TapeSent(request.request_id, states)
        except SwarmError as error:
            answer = error_reply(error, request.request_id)
        except Exception as error:
            bug = internal_error(error, f"bug while a tape was sent {session}")
            answer = error_reply(bug, request.request_id)
        finally:
            self._ended(session)
        _post(session, answer)

    def _from_tape(self, session: Session, request: SendTape) -> WireTensor:
        if session.tape is None or session.is_closed:
            raise TapeLostError("what this session puts out is not kept")
        num_tokens = session.plan.batch_size * (request.end - request.start)
        if not 0 < num_tokens <= self._admission.max_step_tokens:
            raise InvalidRequestError(f"{num_tokens} tokens of a tape at once, 1 to {self._admission.max_step_tokens}")
        states = session.tape.part(request.start, request.end)
        # It costs what it would cost if the client sent it here.
        self._admission.rates.frame(session.plan.peer_id, memoryview(states.data).nbytes, _now_s())
        return states


async def _pushed(session: Session, step: Step, output: WireTensor) -> bool:
    """Send `output` to the first node that `step` goes on to; return whether it took it."""
    to, *others = step.onward
    following = Step(to.step_id, step.position, output, step.row_order, to.max_tokens, tuple(others), step.wants_output)
    return await session.downstream.push(following, to)


def _without_output(reply: StepReply) -> StepReply:
    return StepReply(reply.step_id, _empty_like(reply.hidden_states), reply.queue_s, reply.compute_s)


def _empty_like(states: WireTensor) -> WireTensor:
    num_rows, _, hidden = states.shape
    return WireTensor(states.dtype, (num_rows, 0, hidden), b"")


def _post(session: Session, message: StepReply | TapeSent | ErrorReply) -> None:
    if session.link is not None:
        session.link.post(message)


def internal_error(error: Exception, what: str) -> InternalError:
    """Log a bug on this side, and return what the peer is told of it."""
    logger.error("%s", what, exc_info=error)
    return InternalError("internal error, see the log of the node")


def _now_s() -> float:
    return asyncio.get_running_loop().time()
