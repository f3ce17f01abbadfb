"""One hop of an open session, and the steps that are on their way through all of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from swarm_client.routing.find_route import Hop
from swarm_client.sent import Sent
from swarm_client.span_stream import SpanStream
from swarm_protocol.errors import SwarmError
from swarm_protocol.ids import PeerId
from swarm_protocol.messages import MAX_ONWARD, WireTensor


@dataclass(frozen=True, slots=True)
class HopTiming:
    """Where one step's time went at one hop, in seconds; what is left of `total_s` is the wire.

    On a ring `total_s` begins when the hop before had told the client that it was done.
    """

    hop: Hop
    total_s: float
    queue_s: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class StepResult:
    """The hidden states (batch, seq, hidden) after the last span, and the time at each hop.

    `outputs` are the states after every span of the route if that was asked for, else those after the last one.
    """

    outputs: tuple[WireTensor, ...]
    timings: tuple[HopTiming, ...]


class Leg:
    """A hop: the stream to its node, and the peer from whom that node takes steps besides this client.

    `failure` says why the node cannot go on; the leg waits to be replaced then.
    """

    def __init__(self, stream: SpanStream, upstream: PeerId | None, step_number: int = 0) -> None:
        """`step_number` is that of the session's step whose row order its cache has seen already."""
        self.stream = stream
        self.upstream = upstream
        self.failure: SwarmError | None = None
        self._step_number = step_number

    @property
    def hop(self) -> Hop:
        """The node and its blocks."""
        return self.stream.hop

    @property
    def peer_id(self) -> PeerId:
        """The node."""
        return self.stream.hop.peer_id

    def order_for(self, step_number: int, row_order: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """Return the row order that the node has to follow in this step: none if it has done so."""
        is_first = self._step_number != step_number
        self._step_number = step_number
        return row_order if is_first else None


@dataclass(slots=True, eq=False)
class Flight:
    """A step of the session on its way: what went into the first hop, and what each leg was told of it."""

    number: int
    states: WireTensor
    position: int
    row_order: tuple[int, ...] | None
    sent: dict[Leg, Sent] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Rows times columns."""
        return self.states.shape[0] * self.states.shape[1]


def direct_segments(is_direct: Sequence[bool]) -> list[range]:
    """Pure: return the legs in segments within which a step goes on by itself; `is_direct[i]`: from leg i to i + 1."""
    segments, start = [], 0
    for index, direct in enumerate((*is_direct, False)):
        if not direct or index - start == MAX_ONWARD:
            segments.append(range(start, index + 1))
            start = index + 1
    return segments
