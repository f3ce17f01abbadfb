"""Pure: the messages by which a session moves from a node that leaves to one that holds the same blocks.

The node that leaves says so on the stream of each session, at any time between other messages:

    Draining                             move on, or the session ends

The rest goes over streams under `TRANSFER_PROTOCOL`. The client asks the one node for a ticket and gives it to the
other, at which it has opened a session for the same blocks:

    OfferSession → SessionOffered        client → node that leaves
    CopySession → SessionCopied          client → node that takes over
    FetchSession → Pages, Pages, …       node that takes over → node that leaves

Any of the requests may be answered with an `ErrorReply`.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from msgspec import Meta

from swarm_protocol.ids import ID_BYTES
from swarm_protocol.spans import Span
from swarm_protocol.wire_tensor import WireTensor

TRANSFER_PROTOCOL = "/umbel/transfer/1"

PIECE_BYTES = 1024 * 1024
"""About what one `Pages` carries, at least a token: a copy of it takes a device less than a millisecond, and its frames
keep nobody else's waiting for long."""

_Id = Annotated[bytes, Meta(min_length=ID_BYTES, max_length=ID_BYTES)]
_Position = Annotated[int, Meta(ge=0, le=1 << 20)]
_Block = Annotated[int, Meta(ge=0, le=65535)]
_Text = Annotated[str, Meta(max_length=160)]


@dataclass(frozen=True, slots=True)
class Draining:
    """This node leaves: open sessions have `leave_s` seconds to move, new ones are refused."""

    kind: ClassVar[int] = 60
    leave_s: Annotated[float, Meta(ge=0)]


@dataclass(frozen=True, slots=True)
class OfferSession:
    """Let the node `to_peer` copy what is cached in the sender's session."""

    kind: ClassVar[int] = 61
    session_id: _Id
    resume_token: _Id
    to_peer: _Text


@dataclass(frozen=True, slots=True)
class SessionOffered:
    """That node may fetch the session once, soon, with `ticket`."""

    kind: ClassVar[int] = 62
    ticket: _Id


@dataclass(frozen=True, slots=True)
class CopySession:
    """Fill the sender's session, in which no step was begun yet, from what the node `from_peer` gives for `ticket`.

    What is cached below `position` stays.
    """

    kind: ClassVar[int] = 63
    session_id: _Id
    resume_token: _Id
    from_peer: _Text
    ticket: _Id
    position: _Position = 0


@dataclass(frozen=True, slots=True)
class SessionCopied:
    """The session holds `position` tokens now; the first step goes there, or lower."""

    kind: ClassVar[int] = 64
    position: _Position


@dataclass(frozen=True, slots=True)
class FetchSession:
    """Send the tokens from `position` on of the session that `ticket` is for, until there are no more.

    The rest is what the two nodes have to agree on.
    """

    kind: ClassVar[int] = 65
    ticket: _Id
    position: _Position
    model: _Text
    revision: _Text
    numerics: _Text
    start_block: _Block
    end_block: _Block

    @property
    def span(self) -> Span:
        """The blocks of the session. Raises ValueError if there are none."""
        return Span(self.start_block, self.end_block)


@dataclass(frozen=True, slots=True)
class Pages:
    """The tokens from `position` on: `states` (tokens, values) has for each token its keys and values.

    In a token's row come, block by block, its keys (batch, heads, head_dim) and then its values. `outputs` (batch,
    tokens, hidden) are what the span made of the tokens, for `SendTape`; seq 0 if that was not kept.
    """

    kind: ClassVar[int] = 66
    position: _Position
    states: WireTensor
    outputs: WireTensor
    is_last: bool
