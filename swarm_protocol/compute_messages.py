"""Pure: the messages of work without a session, whole sequences run through blocks, forward or back.

On a stream under `COMPUTE_PROTOCOL`, one after the other:

    Forward → ForwardReply | ErrorReply
    Backward → BackwardReply | ErrorReply

Nothing is kept between two of them: a backward pass brings what went into the forward pass, and the node computes that
again. So any node that has the blocks can serve it, whoever ran the forward pass.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from msgspec import Meta

from swarm_protocol.spans import Span
from swarm_protocol.wire_tensor import WireTensor

COMPUTE_PROTOCOL = "/umbel/compute/1"

_Id = Annotated[int, Meta(ge=1, le=(1 << 62))]
_Text = Annotated[str, Meta(max_length=160)]
_Block = Annotated[int, Meta(ge=0, le=65535)]


@dataclass(frozen=True, slots=True)
class Forward:
    """Run `hidden_states` (batch, seq, hidden) through blocks `[start_block, end_block)` without any cache."""

    kind: ClassVar[int] = 20
    request_id: _Id
    model: _Text
    revision: _Text
    start_block: _Block
    end_block: _Block
    hidden_states: WireTensor

    @property
    def span(self) -> Span:
        """The blocks asked for. Raises ValueError if there are none."""
        return Span(self.start_block, self.end_block)


@dataclass(frozen=True, slots=True)
class ForwardReply:
    """The output (batch, seq, hidden) of the Forward with the same id."""

    kind: ClassVar[int] = 21
    request_id: _Id
    hidden_states: WireTensor


@dataclass(frozen=True, slots=True)
class Backward:
    """Bring `gradients` (batch, seq, hidden) of the output of a Forward of `hidden_states` back to its input."""

    kind: ClassVar[int] = 22
    request_id: _Id
    model: _Text
    revision: _Text
    start_block: _Block
    end_block: _Block
    hidden_states: WireTensor
    gradients: WireTensor

    @property
    def span(self) -> Span:
        """The blocks asked for. Raises ValueError if there are none."""
        return Span(self.start_block, self.end_block)


@dataclass(frozen=True, slots=True)
class BackwardReply:
    """The gradients (batch, seq, hidden) of the input of the Backward with the same id, in the dtype that came."""

    kind: ClassVar[int] = 23
    request_id: _Id
    gradients: WireTensor
