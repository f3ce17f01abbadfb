"""A peer that floods a node in the way that it is told, for `bench.flood`; a process of its own, with its own peer id.

    python -m bench.flooder MADDR MODEL REVISION BLOCKS HIDDEN

Reads one word a line: the name of a flood, which then goes on, or `stop`. Answers `ready` when it has done so.
"""

import asyncio
import contextlib
import itertools
import secrets
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import torch

from swarm_protocol.errors import SwarmError
from swarm_protocol.ids import PeerId
from swarm_protocol.message_stream import MessageStream
from swarm_protocol.messages import (
    COMPUTE_PROTOCOL,
    PROTOCOL_VERSIONS,
    SESSION_PROTOCOL,
    CloseSession,
    Forward,
    Message,
    OpenSession,
    Ping,
    SessionOpened,
    Step,
    WireTensor,
)
from swarm_protocol.tensors import to_wire
from swarm_protocol.transport.base import Transport
from swarm_protocol.transport.hivemind_net import open_transport
from swarm_protocol.transport.network_config import NetworkConfig
from swarm_protocol.wire import encode

_TOGETHER = 10
"""Small messages that are sent before the first of their answers is read; a node lets 16 answers wait."""


@dataclass(frozen=True, slots=True)
class Target:
    """The node, and what it serves."""

    transport: Transport
    node: PeerId
    model: str
    revision: str
    num_blocks: int
    hidden_size: int

    def states(self, num_tokens: int, value: float | None = None) -> WireTensor:
        """Return random hidden states, or such as are `value` everywhere."""
        shape = (1, num_tokens, self.hidden_size)
        return to_wire(torch.randn(shape) if value is None else torch.full(shape, value))

    async def dial(self, protocol: str = SESSION_PROTOCOL) -> MessageStream:
        """Open a stream."""
        return MessageStream(await self.transport.dial(self.node, protocol))

    async def open(self, max_tokens: int, num_blocks: int | None = None) -> MessageStream:
        """Open a session."""
        stream = await self.dial()
        await stream.send(
            OpenSession(
                secrets.token_bytes(16),
                PROTOCOL_VERSIONS,
                self.model,
                self.revision,
                0,
                num_blocks or self.num_blocks,
                1,
                max_tokens,
            )
        )
        reply = await stream.receive()
        if not isinstance(reply, SessionOpened):
            await stream.close()
            raise SwarmError(str(reply))
        return stream


async def _ask_for_ever(stream: MessageStream, messages: Sequence[Message]) -> None:
    while True:
        for message in messages:
            await stream.send(message)
        for _ in messages:
            await stream.receive()


async def _decode(stream: MessageStream, target: Target) -> None:
    states = target.states(1)
    for step_id in itertools.count(1):
        await stream.send(Step(step_id, (step_id - 1) % 60, states))
        await stream.receive()


async def pings(target: Target, number: int) -> None:
    """Ask for signs of life."""
    await _ask_for_ever(await target.open(64), [Ping(1)] * _TOGETHER)


async def openings(target: Target, number: int) -> None:
    """Open a session, close it, and so on."""
    while True:
        stream = await target.open(64)
        await stream.send(CloseSession())
        await stream.receive()
        await stream.close()


async def dials(target: Target, number: int) -> None:
    """Open streams and end them."""
    while True:
        await (await target.dial()).close()


async def malformed(target: Target, number: int) -> None:
    """Send bytes that are no message, on one stream after the other."""
    while True:
        frames = await target.transport.dial(target.node, SESSION_PROTOCOL)
        await frames.send([b"\x01\x63" + bytes(100)])
        with contextlib.suppress(SwarmError):
            await frames.receive()
        await frames.close()


async def oversized(target: Target, number: int) -> None:
    """Send messages that are larger than any that is let in, on one stream after the other."""
    await _send_frames(target, _frames(target, 15_000_000 // target.hidden_size))


async def half_messages(target: Target, number: int) -> None:
    """Send messages of the largest size that are one frame short, on one stream after the other."""
    await _send_frames(target, _frames(target, 4096)[:-1])


def _frames(target: Target, num_tokens: int) -> list[bytes]:
    request = Forward(1, target.model, target.revision, 0, target.num_blocks, target.states(num_tokens))
    return [b"".join(parts) for parts in encode(request)]


async def _send_frames(target: Target, frames: Sequence[bytes]) -> None:
    while True:
        stream = await target.transport.dial(target.node, COMPUTE_PROTOCOL)
        with contextlib.suppress(SwarmError):
            for frame in frames:
                await stream.send([frame])
        await stream.close()


async def big_refused(target: Target, number: int) -> None:
    """Send forward passes of 9 MB that hold no numbers."""
    states = target.states(4096, float("nan"))
    stream = await target.dial(COMPUTE_PROTOCOL)
    await _ask_for_ever(stream, [Forward(1, target.model, target.revision, 0, target.num_blocks, states)])


async def refused_steps(target: Target, number: int) -> None:
    """Send steps that have no place."""
    await _ask_for_ever(await target.open(64), [Step(99, 0, target.states(1))] * _TOGETHER)


async def nan_steps(target: Target, number: int) -> None:
    """Send steps that hold no numbers."""
    stream, states = await target.open(64), target.states(1, float("nan"))
    for step_id in itertools.count(1):
        await stream.send(Step(step_id, 0, states))
        await stream.receive()


async def forwards(target: Target, number: int) -> None:
    """Ask for forward passes of 2,048 tokens."""
    stream = await target.dial(COMPUTE_PROTOCOL)
    states = target.states(2048)
    await _ask_for_ever(stream, [Forward(1, target.model, target.revision, 0, target.num_blocks, states)])


async def prefills(target: Target, number: int) -> None:
    """Send prompts of 1,024 tokens."""
    stream, states = await target.open(1024), target.states(1024)
    for step_id in itertools.count(1):
        await stream.send(Step(step_id, 0, states))
        await stream.receive()


async def decoding(target: Target, number: int) -> None:
    """Decode in a session."""
    await _decode(await target.open(64), target)


async def ranges(target: Target, number: int) -> None:
    """Decode in a session over a range of blocks that no other has."""
    await _decode(await target.open(64, target.num_blocks - number), target)


FLOODS: dict[str, tuple[Callable[[Target, int], Awaitable[None]], int]] = {
    "pings": (pings, 8),
    "dials": (dials, 8),
    "openings": (openings, 8),
    "malformed": (malformed, 8),
    "oversized": (oversized, 4),
    "half_messages": (half_messages, 4),
    "big_refused": (big_refused, 4),
    "refused_steps": (refused_steps, 8),
    "nan_steps": (nan_steps, 16),
    "forwards": (forwards, 4),
    "prefills": (prefills, 8),
    "decoding_4": (decoding, 4),
    "decoding_16": (decoding, 16),
    "decoding_64": (decoding, 64),
    "ranges_16": (ranges, 16),
}
"""What there is, and how many tasks do it at once."""


async def _go_on(flood: Callable[[Target, int], Awaitable[None]], target: Target, number: int) -> None:
    while True:
        try:
            await flood(target, number)
        except SwarmError:
            await asyncio.sleep(0.01)


async def _main(address: str, model: str, revision: str, num_blocks: str, hidden_size: str) -> None:
    torch.set_num_threads(1)
    network = NetworkConfig(initial_peers=(address,), host="127.0.0.1", client_mode=True)
    transport = await open_transport(network)
    target = Target(transport, PeerId(address.rsplit("/", 1)[1]), model, revision, int(num_blocks), int(hidden_size))
    tasks: list[asyncio.Task[None]] = []
    try:
        while word := (await asyncio.to_thread(sys.stdin.readline)).strip():
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            tasks = []
            if word != "stop":
                flood, count = FLOODS[word]
                tasks = [asyncio.create_task(_go_on(flood, target, number)) for number in range(count)]
            else:
                # What the streams of before have left is gone with this peer's connection.
                await transport.close()
                transport = await open_transport(network)
                target = Target(transport, target.node, model, revision, int(num_blocks), int(hidden_size))
            sys.stdout.write("ready\n")
            sys.stdout.flush()
    finally:
        for task in tasks:
            task.cancel()
        await transport.close()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
