"""Pure: who may do what at this node, and what it reserves for them.

KV cache is counted in token-blocks, one token in one block: a session over `n` of the span's blocks for `b` rows of `t`
tokens takes `n * b * t` of them from when it is admitted to when it is released. Sessions open small and are extended
as they grow; so that they can, new ones are refused while little is left, and one peer never gets all of it. The ledger
performs no I/O; its owner releases what it was given, on every way out.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from server_node.config import NodeLimits
from server_node.rates import PeerRates
from swarm_protocol.errors import (
    BlocksNotServedError,
    CacheFullError,
    InvalidRequestError,
    InvalidTensorError,
    LimitExceededError,
    NodeDrainingError,
    RevisionMismatchError,
    SwarmError,
    UnsupportedVersionError,
)
from swarm_protocol.ids import PeerId, parse_peer_id
from swarm_protocol.messages import PROTOCOL_VERSIONS, Backward, Forward, OpenSession, Step, WireTensor
from swarm_protocol.spans import Span
from swarm_protocol.tensors import check_hidden_states
from swarm_protocol.wire_tensor import INT8_ROWS

HIDDEN_DTYPES = frozenset({"float32", "bfloat16", "float16", INT8_ROWS})
"""What hidden states may arrive in; they are computed in the node's dtype and go back in the one they came in."""

_BYTES_PER_VALUE = 4

_HELD_MESSAGES_PER_PEER = 8
_HELD_MESSAGES = 32
"""Messages of the full payload that may be half here, or wait as forward passes: 2 GiB in all by default. What a
session sends is bounded by its reserved tokens besides; forward passes reserve nothing."""


@dataclass(frozen=True, slots=True)
class ServedSpan:
    """What the node serves. `cache_tokens` is its KV cache, in tokens that it can hold in every block of the span."""

    model: str
    revision: str
    span: Span
    hidden_size: int
    dtype: str
    cache_tokens: int
    numerics: str = ""
    """As in the node's record: keys and values move only between nodes whose numerics are equal."""


@dataclass(frozen=True, slots=True)
class SessionPlan:
    """What was reserved for a session, and for whom.

    Steps come from the peer `upstream`, too; with `keeps_tape` what goes out may be asked for again.
    """

    session_id: bytes
    peer_id: PeerId
    version: int
    blocks: Span
    batch_size: int
    max_tokens: int
    upstream: PeerId | None = None
    keeps_tape: bool = False

    @property
    def token_blocks(self) -> int:
        """The KV cache that is reserved."""
        return len(self.blocks) * self.batch_size * self.max_tokens


class Admission:
    """The ledger of one node. Not thread-safe: the event loop owns it."""

    def __init__(self, served: ServedSpan, limits: NodeLimits) -> None:
        self.served = served
        self.limits = limits
        self.leaves_at_s: float | None = None
        """When open sessions have to be gone, on the loop's clock, once the node is draining."""
        self.has_left = False
        """Whether it takes no more steps either."""
        self.free_token_blocks = self._all_token_blocks
        self.num_queued = 0
        self._sessions: Counter[PeerId] = Counter()
        self._reserved: Counter[PeerId] = Counter()
        self._streams: Counter[PeerId] = Counter()
        self._queued: Counter[PeerId] = Counter()
        self._held_bytes: Counter[PeerId] = Counter()
        self.rates = PeerRates(
            limits.peer_bytes_per_s, limits.peer_burst_bytes, limits.peer_messages_per_s, limits.peer_burst_messages
        )

    @property
    def is_draining(self) -> bool:
        """Whether the node is leaving: what is open goes on for a while, nothing new is begun."""
        return self.leaves_at_s is not None

    @property
    def free_tokens(self) -> int:
        """Tokens that still fit into every block of the span."""
        return self.free_token_blocks // len(self.served.span)

    @property
    def tokens_for_new_sessions(self) -> int:
        """The same, less what is kept for the open ones to grow into."""
        return max(0, self.free_token_blocks - self._headroom) // len(self.served.span)

    @property
    def num_sessions(self) -> int:
        return self._sessions.total()

    @property
    def num_peers(self) -> int:
        """Peers that have a stream open here."""
        return len(self._streams)

    @property
    def num_streams(self) -> int:
        return self._streams.total()

    @property
    def max_step_tokens(self) -> int:
        """Rows times tokens of the largest step that is taken, bounded by what one message may carry."""
        return max(1, min(self.limits.max_step_tokens, self.limits.max_payload_bytes // self._bytes_of_tokens(1)))

    def payload_bytes(self, plan: SessionPlan | None = None) -> int:
        """Return the largest payload to let in: of a session never more tokens than the whole cache could hold."""
        tokens = self.max_step_tokens
        if plan is not None:
            cacheable = self._all_token_blocks // len(plan.blocks)
            tokens = min(tokens, max(cacheable, plan.batch_size * plan.max_tokens))
        return self._bytes_of_tokens(tokens)

    def pass_bytes(self) -> int:
        """Return the largest payload to let in of a pass without a session: states, and gradients of as many."""
        return 2 * self._bytes_of_tokens(self.max_step_tokens)

    def admit(self, request: OpenSession, peer_id: PeerId) -> SessionPlan:
        """Reserve what `request` asks for. Raises SwarmError, and then nothing is reserved."""
        if self.is_draining:
            raise NodeDrainingError("this node is leaving and takes no new sessions")
        versions = set(request.versions) & set(PROTOCOL_VERSIONS)
        if not versions:
            raise UnsupportedVersionError(request.versions, PROTOCOL_VERSIONS)
        blocks, upstream = self._checked_blocks(request), _neighbour(request.upstream)
        keeps_tape = _neighbour(request.downstream) is not None
        if self._sessions[peer_id] >= self.limits.max_sessions_per_peer:
            raise LimitExceededError(f"this peer has {self._sessions[peer_id]} open sessions, which is the limit")
        if self.num_sessions >= self.limits.max_sessions:
            raise LimitExceededError(f"{self.num_sessions} sessions are open here, which is the limit")
        plan = SessionPlan(
            request.session_id,
            peer_id,
            max(versions),
            blocks,
            request.batch_size,
            request.max_tokens,
            upstream,
            keeps_tape,
        )
        self._reserve(plan, plan.max_tokens, self._headroom)
        self._sessions[peer_id] += 1
        return plan

    def extend(self, plan: SessionPlan, max_tokens: int) -> SessionPlan:
        """Return `plan` with `max_tokens` tokens per row reserved, if those are more.

        Raises CacheFullError, and then nothing has changed.
        """
        more = max_tokens - plan.max_tokens
        if more <= 0:
            return plan
        self._reserve(plan, more, 0)
        return replace(plan, max_tokens=max_tokens)

    def release(self, plan: SessionPlan) -> None:
        """Give back what `admit` and `extend` reserved; once for each session."""
        self.free_token_blocks += plan.token_blocks
        _take(self._reserved, plan.peer_id, plan.token_blocks)
        _take(self._sessions, plan.peer_id)

    @property
    def _headroom(self) -> int:
        """Token-blocks that are kept for open sessions to grow into."""
        return int(self.limits.headroom_share * self._all_token_blocks) if self.num_sessions else 0

    @property
    def _all_token_blocks(self) -> int:
        return self.served.cache_tokens * len(self.served.span)

    def _reserve(self, plan: SessionPlan, num_tokens: int, kept_back: int) -> None:
        """Reserve `num_tokens` more tokens per row and leave `kept_back` token-blocks free. Raises CacheFullError."""
        of_one_token = len(plan.blocks) * plan.batch_size
        share, free = self.limits.max_cache_share_per_peer, self.free_token_blocks - kept_back
        if share < 1.0:
            free = min(free, int(share * self._all_token_blocks) - self._reserved[plan.peer_id])
        if num_tokens * of_one_token > free:
            raise CacheFullError(num_tokens * plan.batch_size, max(0, free) // len(plan.blocks))
        self.free_token_blocks -= num_tokens * of_one_token
        self._reserved[plan.peer_id] += num_tokens * of_one_token

    def is_flooding(self, peer_id: PeerId, now_s: float) -> bool:
        """Whether a peer that is over its rates opens more streams than it may have."""
        return self._streams[peer_id] >= self.limits.max_streams_per_peer and self.rates.wait_s(peer_id, now_s) > 0

    @contextmanager
    def stream(self, peer_id: PeerId) -> Iterator[None]:
        """Count a stream of `peer_id` while it is served. Raises LimitExceededError."""
        if self._streams[peer_id] >= self.limits.max_streams_per_peer or self.num_streams >= self.limits.max_streams:
            raise LimitExceededError(f"this node serves no more streams now: {self._streams[peer_id]} are this peer's")
        self._streams[peer_id] += 1
        try:
            yield
        finally:
            _take(self._streams, peer_id)

    def queue(self, peer_id: PeerId) -> None:
        """Count a step or forward pass that waits or runs. Raises LimitExceededError, NodeDrainingError."""
        if self.has_left:
            raise NodeDrainingError("this node is leaving and takes no more steps")
        if self._queued[peer_id] >= self.limits.max_queued_per_peer or self.num_queued >= self.limits.max_queued:
            raise LimitExceededError(f"{self.num_queued} steps wait here, {self._queued[peer_id]} of them this peer's")
        self.queue_anyway(peer_id)

    def queue_anyway(self, peer_id: PeerId) -> None:
        """Count what waits without computing anything."""
        self._queued[peer_id] += 1
        self.num_queued += 1

    def unqueue(self, peer_id: PeerId) -> None:
        """The step or forward pass ended."""
        _take(self._queued, peer_id)
        self.num_queued -= 1

    @property
    def held_bytes(self) -> int:
        """What `hold` counted of all peers."""
        return self._held_bytes.total()

    def hold(self, peer_id: PeerId, num_bytes: int) -> None:
        """Count memory of a message that a peer is sending. Raises LimitExceededError, and then nothing is counted."""
        own_bytes, full_bytes = self._held_bytes[peer_id] + num_bytes, self.limits.max_payload_bytes
        if (
            own_bytes > _HELD_MESSAGES_PER_PEER * full_bytes
            or self.held_bytes + num_bytes > _HELD_MESSAGES * full_bytes
        ):
            raise LimitExceededError(f"too many messages arrive at once: {own_bytes} bytes are this peer's")
        self._held_bytes[peer_id] = own_bytes

    def unhold(self, peer_id: PeerId, num_bytes: int) -> None:
        """The memory is free again."""
        _take(self._held_bytes, peer_id, num_bytes)

    def check_pass(self, request: Forward | Backward) -> Span:
        """Return the blocks that `request` is to run through. Raises SwarmError if it cannot be served."""
        if self.is_draining:
            raise NodeDrainingError("this node is leaving and begins nothing new")
        blocks = self._checked_blocks(request)
        self._check_hidden_states(request.hidden_states, None)
        if not math.prod(request.hidden_states.shape):
            raise InvalidTensorError(f"hidden states of shape {request.hidden_states.shape} hold nothing to run")
        if isinstance(request, Backward):
            check_hidden_states(request.gradients, HIDDEN_DTYPES, None, self.served.hidden_size)
            if request.gradients.shape != request.hidden_states.shape:
                raise InvalidTensorError(f"gradients of {request.gradients} for {request.hidden_states}")
        return blocks

    def step_problem(self, step: Step, plan: SessionPlan) -> SwarmError | None:
        """Return what is wrong with the content of a step, or None."""
        try:
            self._check_hidden_states(step.hidden_states, plan.batch_size)
        except SwarmError as error:
            return error
        order = step.row_order
        if order is not None and (len(order) != plan.batch_size or max(order) >= plan.batch_size):
            return InvalidRequestError(f"row_order names {plan.batch_size} rows, 0 to {plan.batch_size - 1}")
        return None

    def _checked_blocks(self, request: OpenSession | Forward | Backward) -> Span:
        served = self.served
        if request.model != served.model:
            raise RevisionMismatchError(f"{request.model!r} was asked for, this node serves {served.model!r}")
        if request.revision != served.revision:
            raise RevisionMismatchError(
                f"revision {request.revision!r} of {served.model} was asked for, this node holds {served.revision!r}"
            )
        try:
            blocks = request.span
        except ValueError as error:
            raise InvalidRequestError(str(error)) from None
        if not served.span.contains(blocks):
            raise BlocksNotServedError(blocks, served.span)
        return blocks

    def _check_hidden_states(self, tensor: WireTensor, batch_size: int | None) -> None:
        check_hidden_states(tensor, HIDDEN_DTYPES, batch_size, self.served.hidden_size)
        num_rows, num_tokens, _ = tensor.shape
        if num_rows * num_tokens > self.max_step_tokens:
            raise InvalidRequestError(
                f"{num_rows} rows of {num_tokens} tokens in one step, at most {self.max_step_tokens} tokens in all are "
                "taken: send them in parts"
            )

    def _bytes_of_tokens(self, num_tokens: int) -> int:
        return num_tokens * self.served.hidden_size * _BYTES_PER_VALUE


def _neighbour(text: str | None) -> PeerId | None:
    try:
        return None if text is None else parse_peer_id(text)
    except ValueError as error:
        raise InvalidRequestError(str(error)) from None


def _take(counter: Counter[PeerId], peer_id: PeerId, count: int = 1) -> None:
    counter[peer_id] -= count
    if not counter[peer_id]:
        del counter[peer_id]
