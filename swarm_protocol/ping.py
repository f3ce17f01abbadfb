"""Measure how far away a peer is.

Here, since a route is found by comparing what clients and nodes measured: both must mean the same by a ping, which is
the time from Ping to Pong on a stream that is open already.
"""

import asyncio

from swarm_protocol.errors import StepTimeoutError, UnexpectedMessageError
from swarm_protocol.ids import PeerId, short_peer
from swarm_protocol.messages import SESSION_PROTOCOL, Ping, Pong
from swarm_protocol.transport.base import FrameStream, Transport
from swarm_protocol.wire import MessageAssembler, encode

PING_TIMEOUT_S = 3.0
"""For dialling and all pings; a route through a peer that is farther away would be no use."""

_NUM_PINGS = 2
"""The better one counts: the first may find the peer's loop or the connection cold."""


async def measure_ping(transport: Transport, peer_id: PeerId, timeout_s: float = PING_TIMEOUT_S) -> float:
    """Return the seconds of a round trip to `peer_id`.

    Raises PeerUnreachableError, StreamLostError, StepTimeoutError or ProtocolError.
    """
    try:
        async with asyncio.timeout(timeout_s):
            stream = await transport.dial(peer_id, SESSION_PROTOCOL)
            try:
                return min([await _round_trip(stream, nonce) for nonce in range(_NUM_PINGS)])
            finally:
                await stream.close()
    except TimeoutError:
        raise StepTimeoutError(f"{short_peer(peer_id)} did not answer a ping within {timeout_s:g} s") from None


async def _round_trip(stream: FrameStream, nonce: int) -> float:
    loop, assembler, reply = asyncio.get_running_loop(), MessageAssembler(), None
    sent_s = loop.time()
    for parts in encode(Ping(nonce)):
        await stream.send(parts)
    while reply is None:
        reply = assembler.feed(await stream.receive())
    if reply != Pong(nonce):
        raise UnexpectedMessageError(f"{type(reply).__name__} came, a Pong was expected")
    return loop.time() - sent_s
