"""The streams on which a session's outputs go on to other nodes. Belongs to the event loop."""

import asyncio
import logging
from itertools import islice

from server_node.config import NodeLimits
from swarm_protocol.errors import PeerUnreachableError, StreamLostError, SwarmError, UnexpectedMessageError
from swarm_protocol.ids import PeerId, parse_peer_id, short_id, short_peer
from swarm_protocol.messages import (
    RING_PROTOCOL,
    ErrorReply,
    JoinSession,
    Message,
    Onward,
    RingJoined,
    Step,
)
from swarm_protocol.transport.base import FrameStream, Transport
from swarm_protocol.wire import MessageAssembler, WireLimits, encode

logger = logging.getLogger(__name__)

_MAX_STREAMS = 4
"""Of one session: to the next node, and to those that take over from it."""

_STALL_S = 1.0
_SLOWEST_BYTES_PER_S = 256 * 1024
"""A frame that does not leave in this time goes to the client, who finds out what is wrong with the next node."""


class Downstream:
    """Sends the steps of one session of `client` to the nodes that are named, one step at a time."""

    def __init__(self, transport: Transport, client: PeerId, limits: NodeLimits) -> None:
        self._transport = transport
        self._client = client
        self._limits = limits
        self._streams: dict[tuple[str, bytes], tuple[FrameStream, asyncio.Task[None]]] = {}
        self._is_closed = False

    async def push(self, step: Step, to: Onward) -> bool:
        """Send `step` to the session that `to` names; False if that node cannot be reached or does not take it."""
        key = (to.peer_id, to.session_id)
        try:
            known = self._streams.get(key)
            stream = known[0] if known is not None else await self._join(to)
            await self._send(stream, step)
        except (SwarmError, TimeoutError) as error:
            logger.info(
                "step goes back to its client, not on to %s: %s session=%s",
                short_peer(PeerId(to.peer_id)), error or "timeout", short_id(to.session_id),
            )  # fmt: skip
            self._drop(key)
            return False
        return True

    def close(self) -> None:
        """End all streams; a push that waits fails. Idempotent."""
        self._is_closed = True
        for key in list(self._streams):
            self._drop(key)

    async def _join(self, to: Onward) -> FrameStream:
        try:
            peer_id = parse_peer_id(to.peer_id)
        except ValueError as error:
            raise PeerUnreachableError(str(error)) from None
        if len(self._streams) >= _MAX_STREAMS:
            self._drop(next(iter(self._streams)))
        async with asyncio.timeout(self._limits.join_s):
            stream = await self._transport.dial(peer_id, RING_PROTOCOL)
            try:
                for parts in encode(JoinSession(self._client, to.session_id)):
                    await stream.send(parts)
                reply = await _receive(stream)
                if not isinstance(reply, RingJoined):
                    problem = reply.message if isinstance(reply, ErrorReply) else f"{type(reply).__name__} came"
                    raise UnexpectedMessageError(problem)
                if self._is_closed:
                    raise StreamLostError("the session was closed")
            except BaseException:
                await stream.close()
                raise
        key = (to.peer_id, to.session_id)
        self._streams[key] = stream, asyncio.create_task(self._until_end(key, stream), name="downstream")
        return stream

    async def _send(self, stream: FrameStream, step: Step) -> None:
        frames = list(islice(encode(step), 2))
        if len(frames) == 1 and stream.send_now(frames[0]):
            return
        for parts in encode(step):
            async with asyncio.timeout(_STALL_S + sum(map(len, parts)) / _SLOWEST_BYTES_PER_S):
                await stream.send(parts)

    async def _until_end(self, key: tuple[str, bytes], stream: FrameStream) -> None:
        """Close the stream when the other side does; it sends nothing after its answer to the first message."""
        try:
            await stream.receive()
        except SwarmError as error:
            logger.debug("downstream ended: %s peer=%s", error, short_peer(stream.peer_id))
        finally:
            if self._streams.get(key, (None,))[0] is stream:
                del self._streams[key]
            await stream.close()

    def _drop(self, key: tuple[str, bytes]) -> None:
        known = self._streams.pop(key, None)
        if known is not None:
            known[1].cancel()  # which closes the stream


async def _receive(stream: FrameStream) -> Message:
    assembler = MessageAssembler(WireLimits(max_payload_bytes=0))
    while True:
        message = assembler.feed(await stream.receive())
        if message is not None:
            return message
