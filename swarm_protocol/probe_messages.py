"""Pure: the messages by which a node has itself tried out before it says that it is online.

The node asks a peer, on a stream under `PROBE_PROTOCOL`, which then dials it, opens a session as a client would, and
runs one token through its blocks:

    ProbeMe → Probed | ErrorReply        what became of it; an error means that it was not tried

On another stream of the same protocol it may measure its uplink, with some bytes that mean nothing:

    Payload → PayloadArrived             up to `MAX_PAYLOADS` times, `MAX_PAYLOAD_BYTES` in all
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from msgspec import Meta

from swarm_protocol.spans import Span
from swarm_protocol.wire_tensor import WireTensor

PROBE_PROTOCOL = "/umbel/probe/1"

MAX_PAYLOADS = 4
MAX_PAYLOAD_BYTES = 1024 * 1024

_Text = Annotated[str, Meta(max_length=160)]
_Block = Annotated[int, Meta(ge=0, le=65535)]


@dataclass(frozen=True, slots=True)
class ProbeMe:
    """Try the blocks `[start_block, end_block)` of the peer that sends this; a token has `hidden_size` values there."""

    kind: ClassVar[int] = 70
    model: _Text
    revision: _Text
    start_block: _Block
    end_block: _Block
    hidden_size: Annotated[int, Meta(ge=1, le=65536)]

    @property
    def span(self) -> Span:
        """The blocks. Raises ValueError if there are none."""
        return Span(self.start_block, self.end_block)


@dataclass(frozen=True, slots=True)
class Probed:
    """What became of the step: `code` is empty if it went well, else that of the error, and `message` says more."""

    kind: ClassVar[int] = 71
    code: Annotated[str, Meta(max_length=64)] = ""
    message: Annotated[str, Meta(max_length=1000)] = ""


@dataclass(frozen=True, slots=True)
class Payload:
    """Bytes that mean nothing, to see how long they take."""

    kind: ClassVar[int] = 72
    values: WireTensor


@dataclass(frozen=True, slots=True)
class PayloadArrived:
    """All of the payload is there."""

    kind: ClassVar[int] = 73
