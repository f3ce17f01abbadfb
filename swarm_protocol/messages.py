"""Pure: every message that travels between peers, as typed data.

A session lives on one stream per hop, opened under `SESSION_PROTOCOL`:

    OpenSession → SessionOpened          reserve KV cache, agree on the version, say what of a prefix is cached already
    Step → StepReply | ErrorReply        prefill and decode; a lower position rolls back, `row_order` permutes the rows,
                                         `max_tokens` extends the reservation
    ResumeSession → SessionResumed       on a new stream after the old one dropped
    SendTape → TapeSent                  send on again what a node has sent on before
    CloseSession → SessionClosed         free the cache

A step may name the nodes that its output goes on to. Each sends it to the next by itself, on a stream under
`RING_PROTOCOL`, and answers the client without it:

    JoinSession → RingJoined             bring the steps of a session, whose client has named this peer
    Step                                 answered to the client, on the stream of its own session

Work without a session is in `compute_messages.py`, how a session moves from a node that leaves to another one in
`transfer_messages.py`, how a node has itself tried out in `probe_messages.py`.

`Ping → Pong` is answered on both. Fields are checked against the ranges written here when a message is decoded
(`wire.py`); what depends on the receiver (the span it serves, its free cache) is checked by the receiver.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from msgspec import Meta

from swarm_protocol.compute_messages import COMPUTE_PROTOCOL as COMPUTE_PROTOCOL
from swarm_protocol.compute_messages import Backward as Backward
from swarm_protocol.compute_messages import BackwardReply as BackwardReply
from swarm_protocol.compute_messages import Forward as Forward
from swarm_protocol.compute_messages import ForwardReply as ForwardReply
from swarm_protocol.errors import SwarmError
from swarm_protocol.ids import ID_BYTES
from swarm_protocol.probe_messages import PROBE_PROTOCOL as PROBE_PROTOCOL
from swarm_protocol.probe_messages import Payload as Payload
from swarm_protocol.probe_messages import PayloadArrived as PayloadArrived
from swarm_protocol.probe_messages import Probed as Probed
from swarm_protocol.probe_messages import ProbeMe as ProbeMe
from swarm_protocol.spans import Span
from swarm_protocol.transfer_messages import TRANSFER_PROTOCOL as TRANSFER_PROTOCOL
from swarm_protocol.transfer_messages import CopySession as CopySession
from swarm_protocol.transfer_messages import Draining as Draining
from swarm_protocol.transfer_messages import FetchSession as FetchSession
from swarm_protocol.transfer_messages import OfferSession as OfferSession
from swarm_protocol.transfer_messages import Pages as Pages
from swarm_protocol.transfer_messages import SessionCopied as SessionCopied
from swarm_protocol.transfer_messages import SessionOffered as SessionOffered
from swarm_protocol.wire_tensor import DTYPE_BYTES as DTYPE_BYTES
from swarm_protocol.wire_tensor import MAX_DIMENSIONS as MAX_DIMENSIONS
from swarm_protocol.wire_tensor import WireTensor as WireTensor
from swarm_protocol.wire_tensor import tensor_bytes as tensor_bytes

PROTOCOL_VERSIONS = (1,)
"""What this side speaks, newest first; agreed on in `OpenSession`."""

SESSION_PROTOCOL = "/umbel/session/1"
RING_PROTOCOL = "/umbel/ring/1"

MAX_BATCH_ROWS = 256
MAX_SESSION_TOKENS = 1 << 20
"""Bounds of what can be asked for at all; nodes have lower ones of their own."""

PAGE_TOKENS = 64
"""Tokens of a page, in which prefixes are named and reservations grow: 2.3 MB for a block of BLOOM-176B in bf16, and
few enough for a chat's first message."""

MAX_IN_FLIGHT = 4
"""Steps of a session that are begun and not answered: pieces of a prompt that are on their way at once."""

MAX_ONWARD = 48
"""Nodes that one step goes on to by itself; behind them it comes to the client. They fit into a header."""

MAX_PREFIX_PAGES = 512
"""Of one session: 32,768 tokens. Their hashes take 9 kB of a header."""

Id = Annotated[bytes, Meta(min_length=ID_BYTES, max_length=ID_BYTES)]
StepId = Annotated[int, Meta(ge=1, le=(1 << 62))]
LastStepId = Annotated[int, Meta(ge=0, le=(1 << 62))]
Position = Annotated[int, Meta(ge=0, le=MAX_SESSION_TOKENS)]
NumTokens = Annotated[int, Meta(ge=1, le=MAX_SESSION_TOKENS)]
NumRows = Annotated[int, Meta(ge=1, le=MAX_BATCH_ROWS)]
Block = Annotated[int, Meta(ge=0, le=65535)]
Seconds = Annotated[float, Meta(ge=0)]
ShortText = Annotated[str, Meta(max_length=160)]
PageHashes = Annotated[tuple[Id, ...], Meta(max_length=MAX_PREFIX_PAGES)]
Versions = Annotated[tuple[Annotated[int, Meta(ge=1, le=65535)], ...], Meta(min_length=1, max_length=16)]
RowOrder = Annotated[tuple[Annotated[int, Meta(ge=0, lt=MAX_BATCH_ROWS)], ...], Meta(max_length=MAX_BATCH_ROWS)]


@dataclass(frozen=True, slots=True)
class OpenSession:
    """Ask for a session over blocks `[start_block, end_block)` for `batch_size` rows of up to `max_tokens` tokens.

    `max_tokens` is what is reserved now; steps may extend it. `prefix` are keyed hashes of the first pages of tokens
    that will come, each covering all before it and whatever else decides the hidden states that enter `start_block`;
    pages are shared among sessions of one row and one peer. `upstream` and `downstream` are the peers of the spans
    before and behind; steps are taken from `upstream`, too, and with `downstream` the outputs are kept for `SendTape`.
    """

    kind: ClassVar[int] = 1
    session_id: Id
    versions: Versions
    model: ShortText
    revision: ShortText
    start_block: Block
    end_block: Block
    batch_size: NumRows
    max_tokens: NumTokens
    upstream: ShortText | None = None
    downstream: ShortText | None = None
    prefix: PageHashes = ()

    @property
    def span(self) -> Span:
        """The blocks asked for. Raises ValueError if there are none."""
        return Span(self.start_block, self.end_block)


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """The cache is reserved. A dropped stream can be resumed with `resume_token` for `resume_grace_s` seconds.

    The first `cached_tokens` tokens of the prefix are in it already: the first step starts there, or lower.
    """

    kind: ClassVar[int] = 2
    version: Annotated[int, Meta(ge=1, le=65535)]
    resume_token: Id
    resume_grace_s: Seconds
    cached_tokens: Position = 0


@dataclass(frozen=True, slots=True)
class ResumeSession:
    """Take up a session whose stream dropped; `last_step_id` is the last step whose reply arrived, 0 for none."""

    kind: ClassVar[int] = 3
    session_id: Id
    resume_token: Id
    last_step_id: LastStepId


@dataclass(frozen=True, slots=True)
class SessionResumed:
    """The session goes on; `last_step_id` is the last step that arrived. Missing replies follow by themselves."""

    kind: ClassVar[int] = 4
    last_step_id: LastStepId
    position: Position


@dataclass(frozen=True, slots=True)
class Onward:
    """A node that a step goes on to, and the step's number and reservation in a session there; as in `Step`."""

    peer_id: ShortText
    session_id: Id
    step_id: StepId
    max_tokens: NumTokens | None = None


OnwardPath = Annotated[tuple[Onward, ...], Meta(max_length=MAX_ONWARD)]


@dataclass(frozen=True, slots=True)
class Step:
    """Run `hidden_states` (batch, seq, hidden) through the session's blocks at `position`.

    A position below the cached tokens rolls back to it first. `row_order`, if given, permutes the rows of the cache
    before that: row i continues what row `row_order[i]` was. With seq 0 nothing else happens. `max_tokens`, if given,
    first extends the reservation to so many tokens per row; where that is refused, so is the step, as `cache_full`.

    `onward` are the nodes that the output goes on to, one after the other; the last one's goes to the client, unless
    `wants_output` is false. From now on steps are taken from the peer `upstream` only, if one is named, and the client.
    """

    kind: ClassVar[int] = 5
    step_id: StepId
    position: Position
    hidden_states: WireTensor
    row_order: RowOrder | None = None
    max_tokens: NumTokens | None = None
    onward: OnwardPath = ()
    wants_output: bool = True
    upstream: ShortText | None = None


@dataclass(frozen=True, slots=True)
class StepReply:
    """The output (batch, seq, hidden) of a step, and how long it waited and was computed at this node.

    It has seq 0 if it was sent on as the step said, or not wanted. A node that cannot send it on answers with it.
    """

    kind: ClassVar[int] = 6
    step_id: StepId
    hidden_states: WireTensor
    queue_s: Seconds = 0.0
    compute_s: Seconds = 0.0


@dataclass(frozen=True, slots=True)
class JoinSession:
    """Bring steps of the session `session_id` that the peer `client` has opened here."""

    kind: ClassVar[int] = 50
    client: ShortText
    session_id: Id


@dataclass(frozen=True, slots=True)
class RingJoined:
    """Steps may come."""

    kind: ClassVar[int] = 51


@dataclass(frozen=True, slots=True)
class SendTape:
    """Send on again the output of the tokens `[start, end)`, as a step of another session through `onward`.

    That step's last output goes nowhere. Without `onward` the output comes back as the answer.
    """

    kind: ClassVar[int] = 52
    request_id: StepId
    start: Position
    end: Position
    onward: OnwardPath = ()


@dataclass(frozen=True, slots=True)
class TapeSent:
    """The output (batch, end - start, hidden) of a `SendTape`; with seq 0 if it was sent on."""

    kind: ClassVar[int] = 53
    request_id: StepId
    hidden_states: WireTensor


@dataclass(frozen=True, slots=True)
class CloseSession:
    """End the session of this stream and free its cache."""

    kind: ClassVar[int] = 8


@dataclass(frozen=True, slots=True)
class SessionClosed:
    """The cache is free again."""

    kind: ClassVar[int] = 9


@dataclass(frozen=True, slots=True)
class Ping:
    """Ask for a sign of life."""

    kind: ClassVar[int] = 30
    nonce: LastStepId


@dataclass(frozen=True, slots=True)
class Pong:
    """Answer a Ping with the same nonce; in a session `last_step_id` is the last step that has arrived."""

    kind: ClassVar[int] = 31
    nonce: LastStepId
    last_step_id: LastStepId = 0


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """Say that the request, or the step or other request with id `step_id`, failed; `code` as in `errors.py`."""

    kind: ClassVar[int] = 40
    code: Annotated[str, Meta(max_length=64)]
    message: Annotated[str, Meta(max_length=1000)]
    retryable: bool
    step_id: StepId | None = None


Message = (
    OpenSession
    | SessionOpened
    | ResumeSession
    | SessionResumed
    | Step
    | StepReply
    | JoinSession
    | RingJoined
    | SendTape
    | TapeSent
    | CloseSession
    | SessionClosed
    | Forward
    | ForwardReply
    | Backward
    | BackwardReply
    | Ping
    | Pong
    | ErrorReply
    | Draining
    | OfferSession
    | SessionOffered
    | CopySession
    | SessionCopied
    | FetchSession
    | Pages
    | ProbeMe
    | Probed
    | Payload
    | PayloadArrived
)

MESSAGE_TYPES: tuple[type[Message], ...] = Message.__args__


def error_reply(error: SwarmError, step_id: int | None = None) -> ErrorReply:
    """Return the message that carries `error` to the other side."""
    return ErrorReply(error.code[:64], str(error)[:1000], error.retryable, step_id)
