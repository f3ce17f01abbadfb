"""A step from outside: whether a node can be reached, and does what it says."""

import asyncio
import secrets

import torch

from swarm_protocol.errors import StepTimeoutError, UnexpectedMessageError, error_from_wire
from swarm_protocol.ids import ID_BYTES, PeerId, short_peer
from swarm_protocol.message_stream import MessageStream
from swarm_protocol.messages import (
    PROTOCOL_VERSIONS,
    SESSION_PROTOCOL,
    CloseSession,
    ErrorReply,
    Message,
    OpenSession,
    SessionClosed,
    SessionOpened,
    Step,
    StepReply,
)
from swarm_protocol.probe_messages import ProbeMe
from swarm_protocol.tensors import check_finite, check_hidden_states, from_wire, to_wire
from swarm_protocol.transport.base import Transport
from swarm_protocol.wire import WireLimits

PROBE_S = 15.0
"""For dialling, opening and the step, which may wait for the device behind others'."""

_DTYPES = frozenset(("float32", "bfloat16", "float16"))
_LIMITS = WireLimits(max_payload_bytes=1024 * 1024)


async def probe(transport: Transport, peer_id: PeerId, asked: ProbeMe, timeout_s: float = PROBE_S) -> None:
    """Run one token through the blocks of `peer_id` in a session of its own.

    Raises SwarmError: it cannot be reached, refuses, does not answer in time, or gives states of another shape or such
    as are not finite.
    """
    try:
        async with asyncio.timeout(timeout_s):
            stream = MessageStream(await transport.dial(peer_id, SESSION_PROTOCOL), _LIMITS)
            try:
                await _run_step(stream, asked)
            finally:
                await stream.close()
    except TimeoutError:
        raise StepTimeoutError(f"{short_peer(peer_id)} did not do a step within {timeout_s:g} s") from None


async def _run_step(stream: MessageStream, asked: ProbeMe) -> None:
    states = torch.randn(1, 1, asked.hidden_size, generator=torch.Generator().manual_seed(0))
    opening = OpenSession(
        secrets.token_bytes(ID_BYTES), PROTOCOL_VERSIONS, asked.model, asked.revision,
        asked.start_block, asked.end_block, 1, 1,
    )  # fmt: skip
    await _ask(stream, opening, SessionOpened)
    reply = await _ask(stream, Step(1, 0, to_wire(states)), StepReply)
    assert isinstance(reply, StepReply)
    check_hidden_states(reply.hidden_states, _DTYPES, 1, asked.hidden_size)
    if reply.hidden_states.shape[1] != 1:
        raise UnexpectedMessageError(f"states of shape {reply.hidden_states.shape} came for one token")
    check_finite(from_wire(reply.hidden_states))
    await _ask(stream, CloseSession(), SessionClosed)


async def _ask(stream: MessageStream, message: Message, wanted: type[Message]) -> Message:
    await stream.send(message)
    reply = await stream.receive()
    if isinstance(reply, ErrorReply):
        raise error_from_wire(reply.code, reply.message, reply.retryable)
    if not isinstance(reply, wanted):
        raise UnexpectedMessageError(f"{type(reply).__name__} came, {wanted.__name__} was expected")
    return reply
