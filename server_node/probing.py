"""Being tried out from outside: a node says that it is online once somebody else's step has gone through it.

A few peers are asked, nodes of the model and the first peers, and the first that got a step through is enough. Where
nobody is there to ask, as for the first node of a swarm, the node tries itself through a second peer of its own, which
has a network daemon of its own: libp2p refuses to dial itself. Where peers are there and none gets through, the node
waits and asks again; it would only be a dead end for clients.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TypeAlias

from server_node.admission import ServedSpan
from server_node.swarm_records import read_records
from swarm_protocol.errors import (
    LimitExceededError,
    PeerUnreachableError,
    StreamLostError,
    SwarmError,
    UnexpectedMessageError,
)
from swarm_protocol.ids import PeerId, short_peer
from swarm_protocol.message_stream import MessageStream
from swarm_protocol.messages import PROBE_PROTOCOL, ErrorReply, Payload, PayloadArrived, Probed, ProbeMe, error_reply
from swarm_protocol.probe import PROBE_S, probe
from swarm_protocol.probe_messages import MAX_PAYLOAD_BYTES, MAX_PAYLOADS
from swarm_protocol.transport.base import FrameStream, Transport
from swarm_protocol.transport.reachability import UNREACHABLE, relays_in
from swarm_protocol.wire import WireLimits

logger = logging.getLogger(__name__)

_NUM_ASKED = 3
_ASK_S = PROBE_S + 5.0
_LOOKUP_S = 20.0
_AGAIN_S = (5.0, 10.0, 20.0, 40.0)
"""Until peers are asked once more, after so many rounds; the last one from then on."""

_MAX_AT_ONCE = 4
_PERIOD_S = 2.0
_MAX_REMEMBERED = 1000
_FIRST_MESSAGE_S = 15.0
_LIMITS = WireLimits(MAX_PAYLOAD_BYTES)

OutsidePeer: TypeAlias = Callable[[], AbstractAsyncContextManager[Transport]]
"""Joins the network as another peer, which knows this node's addresses."""


class Prober:
    """Tries out the peers that ask for it. Belongs to the event loop."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._running: set[PeerId] = set()
        self._tried_s: dict[PeerId, float] = {}

    async def serve(self, stream: FrameStream) -> None:
        """Serve one stream of PROBE_PROTOCOL. Only the peer that asks is dialled: nobody else is bothered."""
        messages = MessageStream(stream, _LIMITS)
        try:
            async with asyncio.timeout(_FIRST_MESSAGE_S):
                asked = await messages.receive()
            if not isinstance(asked, ProbeMe | Payload):
                raise UnexpectedMessageError(f"{type(asked).__name__} has no place on a stream for probes")
            self._admit(stream.peer_id)
            try:
                if isinstance(asked, Payload):
                    await _take_payloads(messages, asked)
                else:
                    await messages.send(await self._try(stream.peer_id, asked))
            finally:
                self._running.discard(stream.peer_id)
        except StreamLostError:
            logger.debug("a stream for probes ended peer=%s", short_peer(stream.peer_id))
        except TimeoutError:
            logger.debug("nothing was asked on a stream for probes peer=%s", short_peer(stream.peer_id))
        except SwarmError as error:
            await messages.send(error_reply(error))

    def _admit(self, peer_id: PeerId) -> None:
        now_s = asyncio.get_running_loop().time()
        self._tried_s = {peer: tried_s for peer, tried_s in self._tried_s.items() if tried_s > now_s - _PERIOD_S}
        is_full = len(self._running) >= _MAX_AT_ONCE or len(self._tried_s) >= _MAX_REMEMBERED
        if is_full or peer_id in self._running or peer_id in self._tried_s:
            raise LimitExceededError(f"one probe in {_PERIOD_S:g} s and peer, {_MAX_AT_ONCE} at a time: ask later")
        self._running.add(peer_id)
        self._tried_s[peer_id] = now_s

    async def _try(self, peer_id: PeerId, asked: ProbeMe) -> Probed:
        try:
            await probe(self._transport, peer_id, asked)
        except SwarmError as error:
            logger.info("a step through %s failed: %s: %s", short_peer(peer_id), error.code, error)
            return Probed(error.code[:64], str(error)[:1000])
        logger.debug("a step through %s went well", short_peer(peer_id))
        return Probed()


async def _take_payloads(messages: MessageStream, first: Payload) -> None:
    """Say of each payload that it is there, as long as there are not too many bytes of them, until the stream ends."""
    num_bytes, payload = 0, first
    async with asyncio.timeout(_FIRST_MESSAGE_S):
        for _ in range(MAX_PAYLOADS):
            num_bytes += memoryview(payload.values.data).nbytes
            if num_bytes > MAX_PAYLOAD_BYTES:
                raise LimitExceededError(f"{num_bytes} bytes of payloads, {MAX_PAYLOAD_BYTES} are allowed")
            await messages.send(PayloadArrived())
            message = await messages.receive()
            if not isinstance(message, Payload):
                raise UnexpectedMessageError(f"{type(message).__name__} has no place among payloads")
            payload = message


@dataclass(frozen=True, slots=True)
class _Problem:
    """Why a step did not go through; `is_unreachable` if a peer could not connect at all."""

    text: str
    is_unreachable: bool = False


class Proof:
    """Gets this node tried out. Belongs to the event loop."""

    def __init__(
        self,
        transport: Transport,
        served: ServedSpan,
        num_blocks: int,
        initial_peers: Sequence[PeerId],
        outside_peer: OutsidePeer,
    ) -> None:
        """`num_blocks` are those of the whole model, whose nodes are asked; `initial_peers` are asked after them."""
        self._transport = transport
        self._served = served
        self._num_blocks = num_blocks
        self._initial_peers = initial_peers
        self._outside_peer = outside_peer
        self._rng = random.Random()  # noqa: S311  # whom to ask is no secret

    async def given(self) -> None:
        """Return once somebody's step has gone through this node; ask again and again until then."""
        for attempt in range(1_000_000):
            problems = await self._ask_round()
            if not problems:
                return
            again_s = _AGAIN_S[min(attempt, len(_AGAIN_S) - 1)]
            is_unreachable = all(problem.is_unreachable for problem in problems)
            logger.warning(
                "not online: no step from outside went through this node%s; trying again in %g s: %s",
                f", {UNREACHABLE}" if is_unreachable and not relays_in(self._transport.addresses) else "",
                again_s, "; ".join(problem.text for problem in problems),
            )  # fmt: skip
            await asyncio.sleep(again_s)

    async def _ask_round(self) -> list[_Problem]:
        """Return nothing if a step went through, else what stood in the way."""
        problems: list[_Problem] = []
        num_tried = 0
        for peer_id in await self.peers():
            try:
                answer = await self._ask(peer_id)
            except Exception as error:  # a peer that cannot be asked says nothing about this node
                logger.debug("%s does not try this node out: %r", short_peer(peer_id), error)
                continue
            if not answer.code:
                logger.info("a step of %s went through this node", short_peer(peer_id))
                return []
            text = f"{short_peer(peer_id)} says {answer.code}: {answer.message}"
            problems.append(_Problem(text, answer.code == PeerUnreachableError.code))
            num_tried += 1
            if num_tried == _NUM_ASKED:
                break
        return problems if num_tried else await self._try_myself()

    async def _ask(self, peer_id: PeerId) -> Probed:
        async with asyncio.timeout(_ASK_S):
            stream = MessageStream(await self._transport.dial(peer_id, PROBE_PROTOCOL), _LIMITS)
            try:
                await stream.send(self._request())
                reply = await stream.receive()
            finally:
                await stream.close()
        if isinstance(reply, ErrorReply) or not isinstance(reply, Probed):
            raise UnexpectedMessageError(f"{reply} came, Probed was expected")
        return reply

    async def _try_myself(self) -> list[_Problem]:
        try:
            async with self._outside_peer() as outside:
                await probe(outside, self._transport.peer_id, self._request())
        except (SwarmError, OSError) as error:
            text = f"nobody else is there to ask, and a second peer of this machine did not get through: {error}"
            return [_Problem(text)]
        logger.info("nobody else is there to ask: a step of a second peer of this machine went through this node")
        return []

    async def peers(self) -> list[PeerId]:
        """Return whom to ask: nodes of this model in any order, then the first peers."""
        served, transport = self._served, self._transport
        try:
            async with asyncio.timeout(_LOOKUP_S):
                records = await read_records(transport, served.model, self._num_blocks)
        except Exception as error:  # a directory passes on whatever happened below it
            logger.warning("the directory could not be read: %r", error)
            records = []
        found = [PeerId(record.peer_id) for record in records if record.state == "online"]
        self._rng.shuffle(found)
        return [peer for peer in dict.fromkeys([*found, *self._initial_peers]) if peer != transport.peer_id]

    def _request(self) -> ProbeMe:
        served = self._served
        return ProbeMe(served.model, served.revision, served.span.start, served.span.end, served.hidden_size)


Prove: TypeAlias = Callable[[], Awaitable[None]]
"""Returns once a step from outside has gone through the node."""


async def needs_no_proof() -> None:
    """For a node that nobody has to try out."""
