"""What the event loop may ask of the device, and what comes back.

Work is described, not passed as a closure, so that the scheduler can see what it is.
"""

from dataclasses import dataclass

from server_node.compute.kv_cache import KVCache
from swarm_protocol.ids import PeerId
from swarm_protocol.messages import MAX_SESSION_TOKENS, WireTensor
from swarm_protocol.spans import Span

NOBODY = PeerId("")
"""The owner of work that no peer asked for."""


@dataclass(frozen=True, slots=True)
class AllocateWork:
    """Make a KV cache for a session, with those pages of `prefix` that are kept for `owner`; as `OpenSession`."""

    blocks: Span
    batch_size: int
    max_tokens: int
    owner: PeerId = NOBODY
    prefix: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class StepWork:
    """Run one step of a session of `owner` over its cache; as `messages.Step`.

    `max_tokens` is how many tokens are reserved by now, None if still those of the allocation.
    """

    cache: KVCache
    blocks: Span
    position: int
    hidden_states: WireTensor
    row_order: tuple[int, ...] | None = None
    max_tokens: int | None = None
    owner: PeerId = NOBODY


@dataclass(frozen=True, slots=True)
class ForwardWork:
    """Run whole sequences of `owner` through some blocks, without a cache."""

    blocks: Span
    hidden_states: WireTensor
    owner: PeerId = NOBODY


@dataclass(frozen=True, slots=True)
class BackwardWork:
    """Bring gradients of what a `ForwardWork` gives back to what it is given; both (batch, seq, hidden)."""

    blocks: Span
    hidden_states: WireTensor
    gradients: WireTensor
    owner: PeerId = NOBODY


@dataclass(frozen=True, slots=True)
class ReadWork:
    """Copy tokens of a session's cache from `position` on, about `max_bytes` of them and none from `end` on."""

    cache: KVCache
    position: int
    max_bytes: int
    end: int = MAX_SESSION_TOKENS
    owner: PeerId = NOBODY


@dataclass(frozen=True, slots=True)
class AppendWork:
    """Write tokens that another node's `ReadWork` gave into a session's cache at `position`; returns the cache."""

    cache: KVCache
    position: int
    states: WireTensor
    owner: PeerId = NOBODY


@dataclass(frozen=True, slots=True)
class ReadTokens:
    """Keys and values (tokens, values) of some tokens; `num_left` are cached behind them."""

    states: WireTensor
    num_left: int


@dataclass(frozen=True, slots=True)
class Computed:
    """The output in the dtype of the input, how long the work waited, and how long it took; or gradients, in theirs.

    Both count from when the work was submitted, `compute_s` the forwards that it was part of.
    """

    hidden_states: WireTensor
    queue_s: float
    compute_s: float


Work = AllocateWork | StepWork | ForwardWork | BackwardWork | ReadWork | AppendWork
