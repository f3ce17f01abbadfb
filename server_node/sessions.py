"""The sessions that a node holds: who may take one up, which replies are kept for whom, and when one ends.

A session is added when it is admitted, opened when its cache is allocated, and released, once, when it is closed and
its last step has left the device. It ends by

    - a close of its peer, or a broken rule of the wire on its stream;
    - `resume_grace_s` after its stream dropped, if nobody resumed it; at once if it was never used;
    - `idle_s` without a step (the reader of its stream watches that);
    - the end of the node.

All of it belongs to the event loop.
"""

import asyncio
import hmac
import logging
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakValueDictionary

from server_node.admission import Admission, SessionPlan
from server_node.compute.kv_cache import KVCache
from server_node.downstream import Downstream
from server_node.link import Link
from swarm_protocol.errors import InvalidRequestError, SessionNotFoundError
from swarm_protocol.ids import ID_BYTES, PeerId, short_id, short_peer
from swarm_protocol.messages import (
    MAX_IN_FLIGHT,
    ErrorReply,
    JoinSession,
    ResumeSession,
    SessionResumed,
    Step,
    StepReply,
    WireTensor,
)
from swarm_protocol.prompt_pages import PromptPages
from swarm_protocol.session_state import Begun, SessionState, State
from swarm_protocol.tape import Tape, TapeBudget
from swarm_protocol.transport.base import Transport
from swarm_protocol.wire_tensor import own_copy

logger = logging.getLogger(__name__)


class Session:
    """One session at this node. `link` is the stream that it is on now, None while it is detached.

    `upstream_link` is the one on which another node brings its steps. Steps run in the order in which they came, each
    in its `turn`, and are answered in that order, each while it holds `sending`.
    """

    def __init__(self, plan: SessionPlan, downstream: Downstream, tape: Tape | None, now_s: float) -> None:
        self.plan = plan
        self.downstream = downstream
        self.tape = tape
        self.prompt: PromptPages | None = None
        self.upstream = plan.upstream
        self.upstream_link: Link | None = None
        self.filling: asyncio.Future[int] | None = None
        self.has_been_filled = False
        self.turn = asyncio.Lock()
        self.sending = asyncio.Lock()
        self._wanted_back: set[int] = set()
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
    def is_untouched(self) -> bool:
        """Whether nothing was ever computed or copied into it."""
        return not self.state.last_begun and not self.has_been_filled

    @property
    def cache(self) -> KVCache:
        """The keys and values; there from when the session is opened to when it is released."""
        if self._cache is None:
            raise RuntimeError(f"no cache is allocated {self}")
        return self._cache

    def keep(self, cache: KVCache, prefix: Sequence[bytes]) -> int:
        """Take the cache that was allocated; return from where on steps have to come, were its tape to begin there."""
        self._cache = cache
        if self.tape is None:
            return cache.position
        owner = self.plan.peer_id.encode()
        self.prompt = PromptPages(self.tape.budget.prefixes, [owner + page_hash for page_hash in prefix])
        return self.prompt.begin(self.tape, cache.position)

    def record(self, step: Step, output: WireTensor) -> None:
        """Keep what a step put out, if that may be asked for again."""
        if self.tape is None:
            return
        if step.row_order is not None:
            self.tape.reorder(step.row_order)
        if self.prompt is not None:
            self.prompt.writes(self.tape, step.position)
        self.tape.write(step.position, own_copy(output))
        if self.prompt is not None:
            self.prompt.keep(self.tape)

    def takes_from(self, upstream: str) -> None:
        """From now on, let only this peer bring steps, besides the one whose session it is."""
        self.upstream = PeerId(upstream)
        if self.upstream_link is not None and self.upstream_link.peer_id != upstream:
            self.leave_upstream()

    def joined(self, link: Link) -> None:
        """The node before brings its steps on `link` from now on."""
        self.leave_upstream()
        self.upstream_link = link

    def leave_upstream(self) -> None:
        """End the stream on which another node brings steps."""
        if self.upstream_link is not None:
            self.upstream_link.finish()
            self.upstream_link = None

    def want_back(self, step_id: int) -> None:
        """The output of a step that still runs is to go to the client, wherever it was to go before."""
        self._wanted_back.add(step_id)

    def is_wanted_back(self, step_id: int) -> bool:
        """Whether `want_back` was said of the step."""
        return step_id in self._wanted_back

    def reply_of(self, step_id: int) -> StepReply | ErrorReply:
        """Return the kept reply of a step that `state` says is finished and not yet acknowledged."""
        return self._replies[step_id]

    def answer(self, step_id: int, reply: StepReply | ErrorReply, sent: StepReply | None = None) -> None:
        """The oldest begun step ended: keep its reply for a resume, and send it, or `sent`, if there is a stream."""
        self._wanted_back.discard(step_id)
        if isinstance(reply, StepReply):
            self.state.finish_step(step_id)
        else:
            self.state.fail_step(step_id)
        self._replies[step_id] = reply
        self._replies.pop(step_id - MAX_IN_FLIGHT, None)
        if self.link is not None:
            self.link.post(sent or reply)

    def begin_step(self, step_id: int, position: int, num_tokens: int, now_s: float) -> Begun:
        """As `SessionState.begin_step`; a step is also a sign of life."""
        begun = self.state.begin_step(step_id, position, num_tokens)
        self.active_s = now_s
        return begun

    def leave_ring(self) -> None:
        """End the streams from and to other nodes, and what they fill the cache with."""
        if self.filling is not None:
            self.filling.cancel()
        self.downstream.close()
        self.leave_upstream()

    def forget(self) -> None:
        """Drop the cache, the tape and the replies."""
        self._cache = None
        self._replies.clear()
        if self.tape is not None:
            self.tape.drop()


class SessionTable:
    """Every session of the node, by peer and id: the ids of one peer say nothing about another's."""

    def __init__(self, admission: Admission, transport: Transport) -> None:
        self._admission = admission
        self._transport = transport
        self._limits = admission.limits
        self._sessions: dict[tuple[PeerId, bytes], Session] = {}
        self.tapes = TapeBudget(self._limits.tape_bytes)
        self._tapes_of: WeakValueDictionary[PeerId, TapeBudget] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

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
        tape = None
        if plan.keeps_tape:
            share = TapeBudget(self._limits.tape_bytes // 2, self.tapes)
            tape = Tape(self._tapes_of.setdefault(plan.peer_id, share))
        downstream = Downstream(self._transport, plan.peer_id, self._limits)
        session = self._sessions[key] = Session(plan, downstream, tape, _now_s())
        return session

    def joined(self, request: JoinSession, link: Link) -> Session:
        """Return the session that the peer of `link` brings steps for. Raises SessionNotFoundError if it may not."""
        session = self._sessions.get((PeerId(request.client), request.session_id))
        if (
            session is None
            or session.upstream != link.peer_id
            or session.state.state not in (State.OPEN, State.DETACHED)
        ):
            raise SessionNotFoundError("no session with this id takes steps from this peer")
        session.joined(link)
        return session

    def opened(self, session: Session, cache: KVCache, prefix: Sequence[bytes], link: Link) -> None:
        """The cache is allocated, with what is known of `prefix`; the session lives on `link` from now on."""
        cached = session.keep(cache, prefix)
        session.link = link
        session.state.opened(cached)
        session.active_s = _now_s()
        plan = session.plan
        logger.info("session opened for %d×%d tokens, %d cached %s", plan.batch_size, plan.max_tokens, cached, session)

    def extend(self, session: Session, max_tokens: int) -> None:
        """Reserve `max_tokens` tokens per row for a session. Raises CacheFullError, and then nothing has changed."""
        session.plan = self._admission.extend(session.plan, max_tokens)
        session.state.extended(session.plan.max_tokens)

    def find(self, peer_id: PeerId, session_id: bytes, resume_token: bytes) -> Session:
        """Return a session to the peer that opened it. Raises SessionNotFoundError, for a wrong token, too."""
        session = self._sessions.get((peer_id, session_id))
        # The comparison takes as long for a session that is not there, so that nobody learns which ids are.
        token = session.resume_token if session is not None else bytes(ID_BYTES)
        is_right = hmac.compare_digest(token, resume_token)
        if session is None or not is_right or session.state.state not in (State.OPEN, State.DETACHED):
            raise SessionNotFoundError("no session with this id and resume token is here: open a new one")
        return session

    @contextmanager
    def held(self, session: Session) -> Iterator[None]:
        """Keep the cache of a session inside, even if it is closed, as while a step runs."""
        session.num_running += 1
        try:
            yield
        finally:
            session.num_running -= 1
            if session.is_closed and not session.num_running:
                self._release(session)

    async def resume(self, request: ResumeSession, link: Link) -> Session:
        """Move a session to `link` and send there what its peer lacks; the stream it was on, if any, is ended.

        Raises SessionNotFoundError for an unknown session as for a wrong token, and StepOrderError for a claim that
        cannot be true; the session then stays as it was.
        """
        session = self.find(link.peer_id, request.session_id, request.resume_token)
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
        if session.is_untouched:  # whoever gave up opening it does not come back, and who does may open another one
            self.close(session)
            return
        session.link = None
        session.state.dropped()
        loop = asyncio.get_running_loop()
        session.expiry = loop.call_later(self._limits.resume_grace_s, self._expire, session)
        logger.info("stream dropped, session kept for %g s %s", self._limits.resume_grace_s, session)

    def close(self, session: Session) -> None:
        """End the session; its cache is free when the step that may run has ended. Idempotent."""
        if session.is_closed:
            return
        session.state.closed()
        session.leave_ring()
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
