"""The sessions that a node holds: who may take one up, which replies are kept for whom, and when one ends.

A session is added when it is admitted, opened when its cache is allocated, and released, once, when it is closed and
its last step has left the device. It ends by

    - a close of its peer, or a broken rule of the wire on its stream;
    - `resume_grace_s` after its stream dropped, if nobody resumed it;
    - `idle_s` without a step (the reader of its stream watches that);
    - the end of the node.

All of it belongs to the event loop.
"""

import asyncio
import hmac
import logging
import secrets

from server_node.admission import Admission, SessionPlan
from server_node.compute.kv_cache import KVCache
from server_node.link import Link
from swarm_protocol.errors import InvalidRequestError, SessionNotFoundError
from swarm_protocol.ids import ID_BYTES, PeerId, short_id, short_peer
from swarm_protocol.messages import ErrorReply, ResumeSession, SessionResumed, StepReply
from swarm_protocol.session_state import Begun, SessionState, State

logger = logging.getLogger(__name__)

MAX_IN_FLIGHT = 1
"""Steps of a session that are begun and not answered; more come with the ring."""


class Session:
    """One session at this node. `link` is the stream that it is on now, None while it is detached."""

    def __init__(self, plan: SessionPlan, now_s: float) -> None:
        self.plan = plan
        self.state = SessionState(plan.max_tokens, MAX_IN_FLIGHT)
        self.resume_token = secrets.token_bytes(ID_BYTES)
        self._cache: KVCache | None = None
        self.link: Link | None = None
        self.active_s = now_s
        self.num_running = 0
        self.released = asyncio.Event()
        self.expiry: asyncio.TimerHandle | None = None
        self._replies: dict[int, StepReply | ErrorReply] = {}

    def __str__(self) -> str:
        plan = self.plan
        return f"peer={short_peer(plan.peer_id)} session={short_id(plan.session_id)} blocks={plan.blocks}"

    @property
    def is_closed(self) -> bool:
        return self.state.state is State.CLOSED

    @property
    def cache(self) -> KVCache:
        """The keys and values; there from when the session is opened to when it is released."""
        if self._cache is None:
            raise RuntimeError(f"no cache is allocated {self}")
        return self._cache

    def keep(self, cache: KVCache) -> None:
        """Take the cache that was allocated."""
        self._cache = cache

    def reply_of(self, step_id: int) -> StepReply | ErrorReply:
        """Return the kept reply of a step that `state` says is finished and not yet acknowledged."""
        return self._replies[step_id]

    def answer(self, step_id: int, reply: StepReply | ErrorReply) -> None:
        """The oldest begun step ended: keep its reply for a resume, and send it if there is a stream."""
        if isinstance(reply, StepReply):
            self.state.finish_step(step_id)
        else:
            self.state.fail_step(step_id)
        self._replies[step_id] = reply
        self._replies.pop(step_id - MAX_IN_FLIGHT, None)
        if self.link is not None:
            self.link.post(reply)

    def begin_step(self, step_id: int, position: int, num_tokens: int, now_s: float) -> Begun:
        """As `SessionState.begin_step`; a step is also a sign of life."""
        begun = self.state.begin_step(step_id, position, num_tokens)
        self.active_s = now_s
        return begun

    def forget(self) -> None:
        """Drop the cache and the replies."""
        self._cache = None
        self._replies.clear()


class SessionTable:
    """Every session of the node, by peer and id: the ids of one peer say nothing about another's."""

    def __init__(self, admission: Admission, resume_grace_s: float) -> None:
        self._admission = admission
        self._resume_grace_s = resume_grace_s
        self._sessions: dict[tuple[PeerId, bytes], Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def num_running(self) -> int:
        """Steps that wait for the device or are on it."""
        return sum(session.num_running for session in self._sessions.values())

    def add(self, plan: SessionPlan) -> Session:
        """Return a session in state OPENING. Raises InvalidRequestError if the id is taken, and releases the plan."""
        key = (plan.peer_id, plan.session_id)
        if key in self._sessions:
            self._admission.release(plan)
            raise InvalidRequestError("a session with this id is open: resume it, or choose another id")
        session = self._sessions[key] = Session(plan, _now_s())
        return session

    def opened(self, session: Session, cache: KVCache, link: Link) -> None:
        """The cache is allocated, with what is known of the prefix; the session lives on `link` from now on."""
        session.keep(cache)
        session.link = link
        session.state.opened(cache.position)
        session.active_s = _now_s()
        plan = session.plan
        logger.info(
            "session opened for %d×%d tokens, %d cached %s", plan.batch_size, plan.max_tokens, cache.position, session
        )

    def extend(self, session: Session, max_tokens: int) -> None:
        """Reserve `max_tokens` tokens per row for a session. Raises CacheFullError, and then nothing has changed."""
        session.plan = self._admission.extend(session.plan, max_tokens)
        session.state.extended(session.plan.max_tokens)

    async def resume(self, request: ResumeSession, link: Link) -> Session:
        """Move a session to `link` and send there what its peer lacks; the stream it was on, if any, is ended.

        Raises SessionNotFoundError for an unknown session as for a wrong token, and StepOrderError for a claim that
        cannot be true; the session then stays as it was.
        """
        session = self._sessions.get((link.peer_id, request.session_id))
        # The comparison takes as long for a session that is not there, so that nobody learns which ids are.
        token = session.resume_token if session is not None else bytes(ID_BYTES)
        is_right = hmac.compare_digest(token, request.resume_token)
        if session is None or not is_right or session.state.state not in (State.OPEN, State.DETACHED):
            raise SessionNotFoundError("no session with this id and resume token is here: open a new one")
        lacking = session.state.replies_to_resend(request.last_step_id)
        self._stop_expiry(session)
        replaced, session.link = session.link, link
        link.post(SessionResumed(session.state.last_begun, session.state.position))
        for step_id in lacking:
            link.post(session.reply_of(step_id))
        logger.info("session resumed, %d replies sent again %s", len(lacking), session)
        if replaced is not None:
            await replaced.abort()
        return session

    def detach(self, session: Session, link: Link) -> None:
        """The stream `link` ended: unless the session moved on or is closed, it waits to be resumed."""
        if session.link is not link or session.is_closed:
            return
        session.link = None
        session.state.dropped()
        loop = asyncio.get_running_loop()
        session.expiry = loop.call_later(self._resume_grace_s, self._expire, session)
        logger.info("stream dropped, session kept for %g s %s", self._resume_grace_s, session)

    def close(self, session: Session) -> None:
        """End the session; its cache is free when the step that may run has ended. Idempotent."""
        if session.is_closed:
            return
        session.state.closed()
        self._stop_expiry(session)
        session.link = None
        logger.info("session closed after %d steps %s", session.state.last_finished, session)
        if not session.num_running:
            self._release(session)

    def step_ended(self, session: Session) -> None:
        """A step left the device; the last one of a closed session frees it."""
        session.num_running -= 1
        session.active_s = _now_s()
        if session.is_closed and not session.num_running:
            self._release(session)

    def close_all(self) -> None:
        """End every session; the streams that they are on are somebody else's."""
        for session in list(self._sessions.values()):
            self.close(session)

    def _release(self, session: Session) -> None:
        del self._sessions[session.plan.peer_id, session.plan.session_id]
        session.forget()
        self._admission.release(session.plan)
        session.released.set()

    def _expire(self, session: Session) -> None:
        logger.info("nobody resumed the session %s", session)
        self.close(session)

    @staticmethod
    def _stop_expiry(session: Session) -> None:
        if session.expiry is not None:
            session.expiry.cancel()
            session.expiry = None


def _now_s() -> float:
    return asyncio.get_running_loop().time()
