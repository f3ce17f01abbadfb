"""One hop of an open session: the stream to its node, the tape of what went in, and how to take a step there."""

import asyncio
from dataclasses import dataclass

from swarm_client.routing.find_route import Hop
from swarm_client.span_stream import SpanStream
from swarm_client.tape import Tape
from swarm_protocol.errors import SwarmError
from swarm_protocol.messages import WireTensor
from swarm_protocol.tensors import check_finite, from_wire


@dataclass(frozen=True, slots=True)
class HopTiming:
    """Where one step's time went at one hop, in seconds; what is left of `total_s` is the wire."""

    hop: Hop
    total_s: float
    queue_s: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class StepResult:
    """The hidden states (batch, seq, hidden) after every span of the route, and the time at each hop."""

    outputs: tuple[WireTensor, ...]
    timings: tuple[HopTiming, ...]


class Leg:
    """A hop and its tape. `failure` says why the node cannot go on; the leg waits to be replaced then."""

    def __init__(self, stream: SpanStream, tape: Tape, step_number: int = 0) -> None:
        """`step_number` is that of the session's step whose row order the tape has seen already."""
        self.stream = stream
        self.tape = tape
        self.failure: SwarmError | None = None
        self._step_number = step_number

    @property
    def hop(self) -> Hop:
        """The node and its blocks."""
        return self.stream.hop

    def begin(
        self, step_number: int, states: WireTensor, position: int, row_order: tuple[int, ...] | None
    ) -> tuple[int, ...] | None:
        """Bring the tape to what the node is about to be given; return the row order that the node has to follow."""
        is_first = self._step_number != step_number
        if is_first:
            self._step_number = step_number
            if row_order is not None:
                self.tape.reorder(row_order)
        self.tape.write(position, states)
        return row_order if is_first else None

    async def step(
        self, states: WireTensor, position: int, row_order: tuple[int, ...] | None, *, is_last: bool
    ) -> tuple[WireTensor, HopTiming]:
        """Return the node's output, which is checked at the last hop: of the others' the next node sees it.

        Raises SwarmError.
        """
        if self.failure is not None:
            raise self.failure.with_traceback(None)
        clock = asyncio.get_running_loop().time
        started_s = clock()
        reply = await self.stream.step(states, position, row_order)
        timing = HopTiming(self.hop, clock() - started_s, reply.queue_s, reply.compute_s)
        if is_last:
            check_finite(from_wire(reply.hidden_states))
        return reply.hidden_states, timing


def own_copy(states: WireTensor) -> WireTensor:
    """Return `states` with memory of its own: the caller may change its tensor, the tape is to keep what was sent."""
    return WireTensor(states.dtype, states.shape, bytes(states.data))
