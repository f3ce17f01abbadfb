"""Pure: what a node says of itself in the directory, and the envelope that makes it its own.

A record is signed by the key behind the peer id, so that it verifies alone. It lives under

    umbel/1/<model name>/<bucket>     subkey: the peer id     value: msgpack [payload, signature]

where a bucket holds the nodes whose span starts in the same `BUCKET_BLOCKS` blocks: a client of an 80-block model reads
ten keys, and no key grows with the whole swarm.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from swarm_protocol.errors import InvalidRecordError
from swarm_protocol.ids import PeerId, is_model_name
from swarm_protocol.messages import Block, ShortText, Versions
from swarm_protocol.spans import Span

MAX_RECORD_BYTES = 2000
BUCKET_BLOCKS = 8
RECORD_LIFETIME_S = 30.0
REFRESH_PERIOD_S = 10.0
"""A killed node is gone after 30 s; two lost refreshes do not take a living one away."""

MAX_PINGS = 8
"""Neighbours that a record names: about 520 of its bytes."""

NodeState = Literal["joining", "online", "draining", "offline"]

Placed = Literal["freely", "by_length", "by_owner"]
"""Whether a node chooses its blocks by itself, within a number of them that its owner has fixed, or not at all."""

Count = Annotated[int, Meta(ge=0, le=(1 << 53))]
Measured = Annotated[float, Meta(ge=0, le=60)]
"""Seconds that a node measured; a stranger writes them, so they are finite and of a size that can be reckoned with."""

Pings = Annotated[tuple[tuple[ShortText, Measured], ...], Meta(max_length=MAX_PINGS)]


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """One node's own words. `incarnation` grows with every start of the node; times are seconds since the epoch.

    `numerics` is equal for two nodes exactly if their KV caches are interchangeable. What follows `name` is for routing
    and may be missing: seconds per block of a decode step, seconds per block and token of a prefill (None where nothing
    was measured), the wait in the queue lately, and round trips to peers that serve the blocks behind this node's. Then
    comes what other nodes plan by: how many blocks it has memory for, None where it does not say; how its blocks were
    placed; and while it drains to take other blocks, which. At last how many bytes a second it was measured to send.
    """

    peer_id: ShortText
    model: ShortText
    revision: ShortText
    start_block: Block
    end_block: Block
    state: NodeState
    incarnation: Count
    published_s: Annotated[float, Meta(ge=0)]
    expires_at_s: Annotated[float, Meta(ge=0)]
    versions: Versions
    software: ShortText
    dtype: ShortText
    numerics: ShortText
    free_tokens: Count
    max_tokens: Count
    name: Annotated[str, Meta(max_length=40)] = ""
    block_step_s: Measured | None = None
    block_token_s: Measured | None = None
    queue_s: Measured = 0.0
    pings_s: Pings = ()
    max_blocks: Block | None = None
    placed: Placed = "by_owner"
    next_blocks: tuple[Block, Block] | None = None
    uplink_bytes_per_s: Count | None = None

    def __post_init__(self) -> None:
        if self.start_block >= self.end_block or not is_model_name(self.model):
            raise ValueError("a record needs a non-empty span and a model name")
        if self.next_blocks is not None and self.next_blocks[0] >= self.next_blocks[1]:
            raise ValueError("blocks to take next are a non-empty span")

    @property
    def planned_span(self) -> Span | None:
        """The blocks that the node serves or is about to serve; None if it leaves."""
        if self.state in ("joining", "online"):
            return self.span
        return Span(*self.next_blocks) if self.state == "draining" and self.next_blocks is not None else None

    @property
    def span(self) -> Span:
        """The blocks that the node serves."""
        return Span(self.start_block, self.end_block)


def directory_key(model: str, start_block: int) -> str:
    """Return the directory key for a node of `model` whose span starts at `start_block`."""
    return f"umbel/1/{model}/{start_block // BUCKET_BLOCKS}"


def directory_keys(model: str, num_blocks: int) -> list[str]:
    """Return every directory key under which nodes of `model` may be found."""
    return [directory_key(model, block) for block in range(0, num_blocks, BUCKET_BLOCKS)]


def newest_records(records: Iterable[NodeRecord]) -> list[NodeRecord]:
    """Return one record of each peer, by peer id: that of its latest start, and of these the latest.

    A node that has started anew or taken other blocks may still be found where it was before.
    """
    newest: dict[str, NodeRecord] = {}
    for record in records:
        known = newest.get(record.peer_id)
        if known is None or (known.incarnation, known.published_s) < (record.incarnation, record.published_s):
            newest[record.peer_id] = record
    return sorted(newest.values(), key=lambda record: record.peer_id)


def seal(record: NodeRecord, sign: Callable[[bytes], bytes]) -> bytes:
    """Return the directory value of `record`. Raises InvalidRecordError if it would be too large."""
    payload = msgspec.msgpack.encode(record)
    value = msgspec.msgpack.encode((payload, sign(payload)))
    if len(value) > MAX_RECORD_BYTES:
        raise InvalidRecordError(f"the record takes {len(value)} bytes, at most {MAX_RECORD_BYTES} are allowed")
    return value


class _Expiry(msgspec.Struct):
    expires_at_s: float


def signed_until(value: bytes, owner: PeerId, verify: Callable[[PeerId, bytes, bytes], bool]) -> float:
    """Return until when `owner` has signed that `value` holds; 0 if it is not `owner`'s own word.

    The directory keeps nothing below a peer's id that expires later than this: else a stranger could take a record's
    place with one of his own, or with an older one of the same node that he gives a longer life.
    """
    try:
        payload, signature = msgspec.msgpack.decode(value, type=tuple[bytes, bytes])
        expires_at_s = msgspec.msgpack.decode(payload, type=_Expiry).expires_at_s
    except (msgspec.DecodeError, ValueError, RecursionError):
        return 0.0
    return expires_at_s if verify(owner, payload, signature) else 0.0


def unseal(value: bytes, owner: PeerId, verify: Callable[[PeerId, bytes, bytes], bool], now_s: float) -> NodeRecord:
    """Return the record that `owner` published as `value`.

    Raises InvalidRecordError if it is too large, malformed, expired, lives longer than allowed, or not `owner`'s.
    """
    if len(value) > MAX_RECORD_BYTES:
        raise InvalidRecordError(f"a record of {len(value)} bytes, at most {MAX_RECORD_BYTES} are allowed")
    try:
        payload, signature = msgspec.msgpack.decode(value, type=tuple[bytes, bytes])
        record = msgspec.msgpack.decode(payload, type=NodeRecord)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InvalidRecordError(f"not a record: {error}") from None
    if record.peer_id != owner or not verify(owner, payload, signature):
        raise InvalidRecordError("the record is not signed by the peer that it speaks of")
    if not now_s < record.expires_at_s <= now_s + 2 * RECORD_LIFETIME_S:
        raise InvalidRecordError("the record is expired, or claims to live too long")
    return record
