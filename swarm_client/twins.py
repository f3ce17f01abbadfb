"""Second nodes for a hop, to which what the first one has cached is copied. Belongs to the event loop."""

import asyncio
from collections.abc import Collection, Sequence
from typing import Protocol

from swarm_client.config import ClientConfig
from swarm_client.events import RouteReason
from swarm_client.leg import Leg
from swarm_client.reservation import tokens_to_reserve
from swarm_client.session_streams import SessionStreams
from swarm_protocol.errors import SessionClosedError, StepTimeoutError, UnexpectedMessageError, error_from_wire
from swarm_protocol.ids import PeerId, short_peer
from swarm_protocol.message_stream import MessageStream
from swarm_protocol.messages import (
    TRANSFER_PROTOCOL,
    CopySession,
    ErrorReply,
    Message,
    OfferSession,
    SessionCopied,
    SessionOffered,
)
from swarm_protocol.transport.base import Transport


class MovingSession(Protocol):
    """What is needed of a session whose legs are copied."""

    @property
    def legs(self) -> Sequence[Leg]:
        """The legs that it has now."""

    @property
    def length(self) -> int:
        """The tokens that went into the first hop, those of a step that runs included."""

    def around(self, leg: Leg) -> tuple[Leg | None, Leg | None]:
        """Return the legs before and behind one."""

    async def play(self, new: Leg, leg: Leg, start: int, end: int) -> None:
        """Have `new` compute the tokens `[start, end)` that `leg` was given. Raises SwarmError or SourceLostError."""

    def exchange(self, leg: Leg, found: Sequence[Leg], reason: RouteReason) -> None:
        """Let `found` take the place of `leg`, whose session is ended."""


class Twins:
    """Opens and fills legs that can take over from those of a session."""

    def __init__(
        self,
        transport: Transport,
        session: MovingSession,
        streams: SessionStreams,
        config: ClientConfig,
        max_length: int,
    ) -> None:
        self._transport = transport
        self._session = session
        self._streams = streams
        self._config = config
        self._max_length = max_length

    def end(self, leg: Leg) -> None:
        """Give up a leg that is not needed."""
        self._streams.end(leg.stream)

    async def open(self, leg: Leg, passed_over: Collection[PeerId]) -> Leg:
        """Return a leg at another node, empty, that can take over what `leg` has cached, but not at these.

        Raises SwarmError.
        """
        reserved = tokens_to_reserve(self._session.length, self._config.reserve_tokens, self._max_length)
        hops = await self._streams.find_route(
            reserved, span=leg.hop.span, without=leg.peer_id, twins_of=leg.hop, passed_over=passed_over
        )
        if leg not in self._session.legs:
            raise SessionClosedError("the session has moved, or is closed")
        before, behind = self._session.around(leg)
        legs, _ = await self._streams.open(
            hops[:1],
            reserved,
            upstream=None if before is None else before.peer_id,
            downstream=None if behind is None else behind.peer_id,
        )
        return legs[0]

    async def copy(self, leg: Leg, found: Leg, position: int, timeout_s: float) -> int:
        """Copy what `leg` has of the tokens from `position` on to `found`; return how many there are then.

        Raises SwarmError.
        """
        old, new = leg.stream, found.stream
        offer = OfferSession(*old.credentials, new.hop.peer_id)
        offered = await self._ask(old.hop.peer_id, offer, self._config.open_s)
        if not isinstance(offered, SessionOffered):
            raise UnexpectedMessageError(f"{type(offered).__name__} came, SessionOffered was expected")
        copy = CopySession(*new.credentials, old.hop.peer_id, offered.ticket, position)
        copied = await self._ask(new.hop.peer_id, copy, max(self._config.open_s, timeout_s))
        if not isinstance(copied, SessionCopied):
            raise UnexpectedMessageError(f"{type(copied).__name__} came, SessionCopied was expected")
        new.filled(copied.position)
        return min(copied.position, self._session.length)  # a step that rolls back may be on its way

    async def _ask(self, peer_id: PeerId, request: Message, timeout_s: float) -> Message:
        try:
            async with asyncio.timeout(timeout_s):
                stream = MessageStream(await self._transport.dial(peer_id, TRANSFER_PROTOCOL))
                try:
                    await stream.send(request)
                    reply = await stream.receive()
                finally:
                    await stream.close()
        except TimeoutError:
            raise StepTimeoutError(
                f"{short_peer(peer_id)} took longer than {timeout_s:.0f} s to move a session"
            ) from None
        if isinstance(reply, ErrorReply):
            raise error_from_wire(reply.code, reply.message, reply.retryable)
        return reply
