"""Measure how many bytes a second this node can send to other peers, with little traffic and rarely.

A payload goes to at most two peers, which say when all of it is there; the fastest counts, since a peer may have a slow
line of its own. What was found is kept for a day: lines change more often than machines.
"""

import asyncio
import json
import logging
import math
import secrets
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from server_node.figure_store import FOLDER, read_small, write_small
from server_node.speed import SpeedMeter
from swarm_protocol.errors import SwarmError, UnexpectedMessageError
from swarm_protocol.ids import PeerId, short_peer
from swarm_protocol.message_stream import MessageStream
from swarm_protocol.messages import PROBE_PROTOCOL, Payload, PayloadArrived, WireTensor
from swarm_protocol.transport.base import Transport

logger = logging.getLogger(__name__)

MAX_PEERS = 2
TIMEOUT_S = 8.0
"""For a peer: dialling, the payloads and their answers."""

_SIZES = (1024, 96 * 1024, 920 * 1024)
"""Bytes, one after the other: for the round trip, to see whether more is worth it, and to fill the line."""

_ENOUGH_S = 0.5
"""A payload that takes so long tells enough, and no larger one is sent."""

_BEGIN_S = 5.0
"""After the node is online: those who try it out, and the first sessions, come first."""

_MAX_AGE_S = 86_400.0


async def measure_uplink(transport: Transport, peer_id: PeerId) -> float:
    """Return bytes a second to `peer_id`. Raises SwarmError or TimeoutError."""
    async with asyncio.timeout(TIMEOUT_S):
        stream = MessageStream(await transport.dial(peer_id, PROBE_PROTOCOL))
        try:
            round_trip_s, rate = await _sent(stream, _SIZES[0]), 0.0
            for size_bytes in _SIZES[1:]:
                # What is nearer than a ping is noise.
                taken_s = max(await _sent(stream, size_bytes) - round_trip_s, 0.05 * round_trip_s, 1e-6)
                rate = size_bytes / taken_s
                if taken_s >= _ENOUGH_S:
                    break
        finally:
            await stream.close()
    return rate


async def _sent(stream: MessageStream, size_bytes: int) -> float:
    values = WireTensor("int64", (size_bytes // 8,), secrets.token_bytes(size_bytes // 8 * 8))
    began_s = asyncio.get_running_loop().time()
    await stream.send(Payload(values))
    reply = await stream.receive()
    if not isinstance(reply, PayloadArrived):
        raise UnexpectedMessageError(f"{type(reply).__name__} came, PayloadArrived was expected")
    return asyncio.get_running_loop().time() - began_s


class Uplink:
    """This node's uplink: known from an earlier start, or measured. Belongs to the event loop."""

    def __init__(
        self, transport: Transport, folder: Path, speed: SpeedMeter, max_bytes_per_s: int | None = None
    ) -> None:
        """`max_bytes_per_s` is what the owner allows, whatever the line carries."""
        self._transport = transport
        self._path = folder / FOLDER / "uplink.json"
        self._speed = speed
        self._max_bytes_per_s = max_bytes_per_s or math.inf

    async def know(self, peers: Callable[[], Awaitable[Sequence[PeerId]]]) -> None:
        """Tell the speed meter; measure with the first of `peers` if nothing is known."""
        known = uplink_from(read_small(self._path), self._transport.now_s())
        if known is not None:
            self._speed.uplink_bytes_per_s = min(known, self._max_bytes_per_s)
            return
        await asyncio.sleep(_BEGIN_S)
        rates: list[float] = []
        for peer_id in (await peers())[:MAX_PEERS]:
            try:
                rates.append(await measure_uplink(self._transport, peer_id))
            except (SwarmError, TimeoutError) as error:
                logger.debug("the uplink to %s was not measured: %r", short_peer(peer_id), error)
        if rates:
            self._speed.uplink_bytes_per_s = rate = min(max(rates), self._max_bytes_per_s)
            logger.info("uplink: %.2f MB/s, tried with %d peers", rate / 1e6, len(rates))
            if self._max_bytes_per_s == math.inf:  # else the line is not known
                values = {"bytes_per_s": rate, "measured_s": self._transport.now_s()}
                write_small(self._path, json.dumps(values))


def uplink_from(text: str | None, now_s: float) -> float | None:
    """Return the rate that a file's text tells; None if it is none or too old."""
    try:
        values = json.loads(text or "")
        rate, age_s = float(values["bytes_per_s"]), now_s - float(values["measured_s"])
    except (ValueError, KeyError, TypeError):
        return None
    return rate if 0.0 < rate < 1e12 and 0.0 <= age_s <= _MAX_AGE_S else None
