"""Copy what sessions have cached from a node to one that takes over, or stands by: both nodes' sides.

Who may fetch what: the client that opened a session proves it with its resume token and names the node that is to have
the pages. That node, and no other, may fetch them with the ticket, once and soon. It writes them only into a session
that the same client has opened there, within what that one has reserved.

Pages are read and written by the device thread in pieces, between which the steps that wait are run. A piece is read
when the one before it has left, so a receiver that is slow holds up nobody, and costs the sender one piece of memory.
"""

import asyncio
import contextlib
import logging
import secrets
from contextlib import ExitStack
from dataclasses import dataclass

from server_node.admission import HIDDEN_DTYPES, Admission, ServedSpan
from server_node.compute.work import AppendWork, ReadWork
from server_node.compute.worker import ComputeWorker
from server_node.link import Link
from server_node.rates import BROKEN_STREAM
from server_node.sessions import Session, SessionTable
from swarm_protocol.errors import (
    InvalidRequestError,
    InvalidTensorError,
    LimitExceededError,
    RevisionMismatchError,
    SessionNotFoundError,
    StepTimeoutError,
    SwarmError,
    TapeLostError,
    UnexpectedMessageError,
    error_from_wire,
)
from swarm_protocol.ids import ID_BYTES, PeerId, parse_peer_id, short_peer
from swarm_protocol.messages import (
    MAX_SESSION_TOKENS,
    TRANSFER_PROTOCOL,
    CopySession,
    ErrorReply,
    FetchSession,
    Message,
    OfferSession,
    Pages,
    SessionCopied,
    SessionOffered,
    WireTensor,
)
from swarm_protocol.tensors import check_hidden_states
from swarm_protocol.transfer_messages import PIECE_BYTES
from swarm_protocol.transport.base import FrameStream, Transport
from swarm_protocol.wire import MessageAssembler, WireLimits, encode
from swarm_protocol.wire_tensor import own_copy

logger = logging.getLogger(__name__)

OFFER_S = 30.0
"""For a ticket to be used: the client passes it on at once, and the other node dials at once."""

PIECE_S = 15.0
"""For the next piece to come: 1 MiB at 70 kB/s."""

COPY_S = 300.0
"""For all of them; longer than any node waits before it leaves."""


@dataclass(frozen=True, slots=True)
class _Offer:
    """A ticket that was given for a session: to whom, and until when."""

    session: Session
    to_peer: str
    expires_s: float


class Transfers:
    """What a node answers on streams of TRANSFER_PROTOCOL. Belongs to the event loop."""

    def __init__(
        self, transport: Transport, admission: Admission, sessions: SessionTable, worker: ComputeWorker
    ) -> None:
        self._transport = transport
        self._admission = admission
        self._sessions = sessions
        self._worker = worker
        self._offers: dict[bytes, _Offer] = {}
        self._filling: set[Session] = set()

    async def converse(self, link: Link, _: ExitStack) -> None:
        """Answer the one request of a stream. Raises SwarmError or TimeoutError, which its owner answers."""
        message = await link.receive(_now_s() + self._admission.limits.first_message_s)
        match message:
            case OfferSession():
                link.post(self._offer(message, link.peer_id))
            case CopySession():
                link.post(await self._copy(message, link.peer_id))
            case FetchSession():
                await self._send(message, link)
            case _:
                raise UnexpectedMessageError(f"{type(message).__name__} has no place on a stream for transfers")

    # the node that has it

    def _offer(self, request: OfferSession, peer_id: PeerId) -> SessionOffered:
        session = self._sessions.find(peer_id, request.session_id, request.resume_token)
        now_s = _now_s()
        # The ticket before it is not needed any more, and a session has one at most.
        self._offers = {
            ticket: offer
            for ticket, offer in self._offers.items()
            if offer.session is not session and offer.expires_s > now_s
        }
        ticket = secrets.token_bytes(ID_BYTES)
        self._offers[ticket] = _Offer(session, request.to_peer, now_s + OFFER_S)
        session.active_s = now_s
        return SessionOffered(ticket)

    async def _send(self, request: FetchSession, link: Link) -> None:
        """Send a session to the node that dialled, until it has all that is cached by then."""
        session = self._taken(request.ticket, link.peer_id)
        check_equal(request, session, self._admission.served)
        position = request.position
        with self._sessions.held(session):
            is_last = False
            while not is_last:
                if session.is_closed:
                    raise SessionNotFoundError("the session was closed while it was copied")
                # No more than the outputs are known of: those of a step that runs come when it has ended.
                end = session.tape.length if session.tape is not None and session.tape.is_whole else MAX_SESSION_TOKENS
                work = ReadWork(session.cache, position, PIECE_BYTES, end, session.plan.peer_id)
                read = await self._worker.run(work)
                outputs = self._outputs(session, position, position + read.states.shape[0])
                num_bytes = memoryview(read.states.data).nbytes + memoryview(outputs.data).nbytes
                self._check_size(num_bytes)
                self._admission.rates.frame(session.plan.peer_id, num_bytes, _now_s())
                is_last = not read.num_left
                link.post(Pages(position, read.states, outputs, is_last))
                position += read.states.shape[0]
                await link.all_sent()
        session.active_s = _now_s()
        logger.info("%d tokens were copied to %s %s", position, short_peer(link.peer_id), session)

    def _taken(self, ticket: bytes, peer_id: PeerId) -> Session:
        """Return the session that `peer_id` may fetch; the ticket is used up. Raises SessionNotFoundError."""
        offer = self._offers.get(ticket)
        if offer is None or offer.to_peer != peer_id or offer.expires_s <= _now_s() or offer.session.is_closed:
            raise SessionNotFoundError("no session here is for this ticket and this peer")
        del self._offers[ticket]
        return offer.session

    def _outputs(self, session: Session, start: int, end: int) -> WireTensor:
        """Return what a session put out for some tokens; nothing if that is not on its tape."""
        if session.tape is not None:
            with contextlib.suppress(TapeLostError):
                return session.tape.part(start, end)
        return WireTensor("float32", (session.plan.batch_size, 0, self._admission.served.hidden_size), b"")

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._admission.limits.max_payload_bytes:
            raise LimitExceededError(f"one token of this session takes {num_bytes} bytes, too many for a message")

    # the node that takes over

    async def _copy(self, request: CopySession, peer_id: PeerId) -> SessionCopied:
        session = self._sessions.find(peer_id, request.session_id, request.resume_token)
        if session in self._filling or session.state.last_begun:
            raise UnexpectedMessageError("this session is being filled, or has begun a step")
        try:
            source = parse_peer_id(request.from_peer)
        except ValueError:
            raise InvalidRequestError(f"{request.from_peer!r} is no peer id") from None
        if source == self._transport.peer_id:
            raise InvalidRequestError("a session cannot be copied to the node that it is at")
        self._filling.add(session)
        session.has_been_filled = True
        try:
            with self._sessions.held(session):
                session.filling = asyncio.ensure_future(self._fetch(session, source, request))
                position = await session.filling
        except asyncio.CancelledError:
            if not session.is_closed:
                raise
            raise SessionNotFoundError("the session was closed while it was filled") from None
        except SwarmError as error:
            self._admission.rates.message(peer_id, _now_s(), BROKEN_STREAM)
            logger.info("session not copied from %s: %s: %s %s", short_peer(source), error.code, error, session)
            raise
        finally:
            session.filling = None
            self._filling.discard(session)
        session.state.filled(position)
        session.active_s = _now_s()
        logger.info("%d tokens were copied from %s %s", position, short_peer(source), session)
        return SessionCopied(position)

    async def _fetch(self, session: Session, source: PeerId, request: CopySession) -> int:
        """Fill a session; return how many tokens it holds. Raises SwarmError; what was written by then is forgotten."""
        served, blocks = self._admission.served, session.plan.blocks
        ask = FetchSession(
            request.ticket, request.position, served.model, served.revision, served.numerics, blocks.start, blocks.end
        )
        try:
            async with asyncio.timeout(COPY_S):
                stream = await self._transport.dial(source, TRANSFER_PROTOCOL)
                try:
                    for parts in encode(ask):
                        await stream.send(parts)
                    return await self._receive_all(session, stream, request.position)
                finally:
                    await stream.close()
        except TimeoutError:
            raise StepTimeoutError(f"{short_peer(source)} does not send the session in time") from None

    async def _receive_all(self, session: Session, stream: FrameStream, position: int) -> int:
        pieces = _Pieces(stream, self._admission, session.plan.peer_id)
        while True:
            async with asyncio.timeout(PIECE_S):
                pages = await pieces.receive()
            try:
                self._check_pages(pages, position, session.plan.batch_size)
                if session.is_closed:
                    raise SessionNotFoundError("the session was closed while it was filled")
                work = AppendWork(session.cache, position, pages.states, session.plan.peer_id)
                await self._worker.run(work)
                if session.tape is not None and pages.outputs.shape[1] and not session.is_closed:
                    # The values share the memory of their frame, which is mostly keys.
                    session.tape.write(position, own_copy(pages.outputs))
            finally:
                pieces.let_go()
            position += pages.states.shape[0]
            if pages.is_last:
                return position

    def _check_pages(self, pages: Pages, position: int, batch_size: int) -> None:
        if pages.position != position:
            raise UnexpectedMessageError(f"tokens from {pages.position} on came, those from {position} on are next")
        if not pages.states.shape:
            raise InvalidTensorError("keys and values without a shape")
        if not pages.is_last and not pages.states.shape[0]:
            raise UnexpectedMessageError("an empty piece came that is not the last one")
        check_hidden_states(pages.outputs, HIDDEN_DTYPES, batch_size, self._admission.served.hidden_size)
        if pages.outputs.shape[1] not in (0, pages.states.shape[0]):
            raise InvalidTensorError(f"outputs of {pages.outputs.shape[1]} tokens came, and keys of {pages.states}")


class _Pieces:
    """Pages as they come in; their memory counts as held for the client until `let_go`."""

    def __init__(self, stream: FrameStream, admission: Admission, client: PeerId) -> None:
        self._stream = stream
        self._admission = admission
        self._client = client
        self._assembler = MessageAssembler(WireLimits(admission.limits.max_payload_bytes))
        self._held_bytes = 0

    async def receive(self) -> Pages:
        """Return the next ones. Raises SwarmError, of the sender's or of its stream."""
        message: Message | None = None
        try:
            while message is None:
                frame = await self._stream.receive()
                self._admission.hold(self._client, len(frame))
                self._held_bytes += len(frame)
                message = self._assembler.feed(frame)
        except BaseException:
            self.let_go()
            raise
        if isinstance(message, Pages):
            return message
        self.let_go()
        if isinstance(message, ErrorReply):
            raise error_from_wire(message.code, message.message, message.retryable)
        raise UnexpectedMessageError(f"{type(message).__name__} came, Pages were expected")

    def let_go(self) -> None:
        """Count no memory as held any more."""
        self._admission.unhold(self._client, self._held_bytes)
        self._held_bytes = 0


def check_equal(request: FetchSession, session: Session, served: ServedSpan) -> None:
    """Raise RevisionMismatchError unless keys and values mean the same at both nodes, and of the same blocks."""
    asked = (request.model, request.revision, request.numerics)
    if asked != (served.model, served.revision, served.numerics):
        raise RevisionMismatchError(
            f"keys and values of {served.numerics!r} are here, {request.numerics!r} was asked for"
        )
    blocks = session.plan.blocks
    if (request.start_block, request.end_block) != (blocks.start, blocks.end):
        raise InvalidRequestError(f"the session has the blocks {blocks}")


def _now_s() -> float:
    return asyncio.get_running_loop().time()
