"""Pure: which of the waiting work runs on the device next.

Rules:

    - Work of a session runs in the order in which it came; only the oldest of each session may be chosen.
    - Allocations run at once: they cost nothing. One with a prefix is a piece, since pages may have to be copied.
    - Decode steps (of one token, or of none) run together when they are of one group, which says that the runner can
      compute them in one forward. The peers take turns in leading a batch with their oldest step, which chooses the
      group; where not all others of the group fit, the peers share the rows, each with its oldest steps first.
    - Everything else is cut into pieces, and a piece is what one chunk of a prefill costs. A prefill is cut by tokens,
      a stateless forward by blocks, so that it needs no cache. One token of a session with many rows, or one block of
      a long forward, is the smallest piece that there is.
    - After a piece, every decode step that waits by then runs before the next piece. So no step waits for more than
      one piece, and steps that keep coming cannot hold up the pieces. A peer whose steps are of so many groups that
      they take more than `max_batches_between` batches waits with the rest of them.
    - A peer whose pieces have kept others waiting for too long is held back while those decode, and its pieces are
      smaller; `device_shares.py` says when. With nobody else decoding, nothing is held back.
    - Of the others, those that are within their burst come first, then prefills before forwards, then who has used the
      device least; of a peer's pieces of one kind the oldest, to its end. So that forwards are not starved, they get
      one of every `forward_every` pieces.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from server_node.compute.device_shares import DeviceShares, ShareLimits
from swarm_protocol.ids import PeerId

_NOBODY = PeerId("")


class Kind(Enum):
    """What work is to the scheduler."""

    ALLOCATE = "allocate"
    DECODE = "decode"
    PREFILL = "prefill"
    FORWARD = "forward"


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How much runs at once."""

    chunk_tokens: int = 256
    """Rows times tokens of a piece. Fewer would stream the weights too often: a CPU needs about 100 rows to be busy."""
    max_rows: int = 64
    """Of a batch of decode steps. A session with more rows runs by itself."""
    max_padded_tokens: int = 16_384
    """Rows times the longest one's tokens, where keys and values are copied: 0.9 GB for a block of BLOOM-176B."""
    forward_every: int = 8
    """Of so many pieces one is a forward's while prefills wait."""
    small_chunk_tokens: int = 64
    """Of a piece of a peer that is over its burst: it then takes a quarter as long, or a bit more."""
    max_batches_between: int = 8
    """Batches that one peer may lead before the next piece runs: 512 rows that join, as many as there are sessions."""
    shares: ShareLimits = field(default_factory=ShareLimits)


@dataclass(frozen=True, slots=True)
class Waiting:
    """Work that waits, or of which some pieces are through. `arrival` numbers work in the order in which it came.

    `session` is None for a forward. `num_tokens` are those that are left, in each row; `num_blocks` are the blocks of a
    forward that are left. `position` counts the tokens that are cached. `group` matters to decode steps only.
    `since_s` is when it came, by the clock of the scheduler's `now_s`.
    """

    arrival: int
    kind: Kind
    session: int | None = None
    group: Hashable = None
    num_rows: int = 1
    num_tokens: int = 1
    position: int = 0
    num_blocks: int = 1
    peer: PeerId = _NOBODY
    since_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Batch:
    """What runs next. `amount` is how many tokens of a prefill, or blocks of a forward; 0 for the other kinds."""

    kind: Kind
    arrivals: tuple[int, ...]
    amount: int = 0


@dataclass(slots=True)
class _Piece:
    """The last piece that ran, until what it cost is settled."""

    peer: PeerId
    started_s: float
    ended_s: float | None = None


class Scheduler:
    """Chooses batches; remembers whose turn it is. Only the compute thread uses it."""

    def __init__(self, limits: BatchLimits | None = None) -> None:
        self.limits = limits or BatchLimits()
        self.wait_s = 0.0
        """After `next_batch` gave None although work waits: in how many seconds to ask again."""
        self._shares = DeviceShares(self.limits.shares)
        self._piece: _Piece | None = None
        self._urgent_until = -1
        self._num_led = 0
        self._led_at: dict[PeerId, int] = {}
        self._led_since_piece: Counter[PeerId] = Counter()
        self._num_prefill_pieces = 0

    def next_batch(self, waiting: Sequence[Waiting], now_s: float) -> Batch | None:
        """Return what runs next; None if nothing waits, or only what is held. `waiting` is in order of arrival."""
        eligible = _oldest_of_each_session(waiting)
        if self._piece is not None:
            self._settle(self._piece, eligible, now_s)
            self._urgent_until = waiting[-1].arrival if waiting else -1
        if not eligible:
            return None
        allocations = [work for work in eligible if work.kind is Kind.ALLOCATE]
        if allocations:
            return Batch(Kind.ALLOCATE, (allocations[0].arrival,))
        decodes = [work for work in eligible if work.kind is Kind.DECODE]
        pieces = [work for work in eligible if work.kind in (Kind.PREFILL, Kind.FORWARD)]
        allowed = [work for work in pieces if not self._shares.wait_s(work.peer, now_s)]
        leads = [work for work in decodes if self._is_urgent(work)] if allowed else decodes
        if leads:
            return self._joined(leads, decodes, now_s)
        if allowed:
            return self._next_piece(allowed, now_s)
        self.wait_s = min(self._shares.wait_s(work.peer, now_s) for work in pieces)
        return None

    def ended(self, now_s: float) -> None:
        """What `next_batch` gave has run."""
        if self._piece is not None:
            self._piece.ended_s = now_s

    # decode steps

    def _is_urgent(self, work: Waiting) -> bool:
        is_next = self._led_since_piece[work.peer] < self.limits.max_batches_between
        return work.arrival <= self._urgent_until and is_next

    def _joined(self, leads: Sequence[Waiting], decodes: Sequence[Waiting], now_s: float) -> Batch:
        """Return the batch of that one of `leads` whose turn it is, and of those that run together with it."""
        lead = min(leads, key=lambda work: (self._led_at.get(work.peer, 0), work.arrival))
        self._num_led += 1
        self._led_at[lead.peer] = self._num_led
        self._led_since_piece[lead.peer] += 1
        group = [work for work in decodes if work.group == lead.group and work is not lead]
        chosen = [lead, *self._fitting(lead, group)]
        self._shares.decoded({work.peer for work in chosen if work.num_tokens}, now_s)
        return Batch(Kind.DECODE, tuple(sorted(work.arrival for work in chosen)))

    def _fitting(self, lead: Waiting, group: Sequence[Waiting]) -> list[Waiting]:
        """Return those of `group` that run with `lead`: the peer with the fewest rows adds its oldest step in turn."""
        rows, longest = Counter({lead.peer: lead.num_rows}), lead.position + lead.num_tokens
        queues: dict[PeerId, list[Waiting]] = {}
        for work in reversed(group):
            queues.setdefault(work.peer, []).append(work)
        chosen = []
        while queues:
            peer = min(queues, key=lambda peer: (rows[peer], queues[peer][-1].arrival))
            work = queues[peer].pop()
            if not queues[peer]:
                del queues[peer]
            num_rows, length = rows.total() + work.num_rows, max(longest, work.position + work.num_tokens)
            if num_rows <= self.limits.max_rows and num_rows * length <= self.limits.max_padded_tokens:
                chosen.append(work)
                rows[peer] += work.num_rows
                longest = length
        return chosen

    # pieces

    def _next_piece(self, pieces: Sequence[Waiting], now_s: float) -> Batch:
        forwards = [work for work in pieces if work.kind is Kind.FORWARD]
        is_forwards_turn = self._num_prefill_pieces >= self.limits.forward_every - 1
        work = min(forwards if forwards and is_forwards_turn else pieces, key=lambda work: self._rank(work, now_s))
        is_over = self._shares.is_over(work.peer, now_s)
        chunk_tokens = self.limits.small_chunk_tokens if is_over else self.limits.chunk_tokens
        self._piece = _Piece(work.peer, now_s)
        if work.kind is Kind.PREFILL:
            self._num_prefill_pieces += 1
            amount = max(1, chunk_tokens // work.num_rows)
            return Batch(Kind.PREFILL, (work.arrival,), min(amount, work.num_tokens))
        self._num_prefill_pieces = 0
        # A piece costs what a chunk costs in all of the blocks that the forward has left.
        amount = chunk_tokens * work.num_blocks // max(1, work.num_rows * work.num_tokens)
        return Batch(Kind.FORWARD, (work.arrival,), max(1, min(amount, work.num_blocks)))

    def _rank(self, work: Waiting, now_s: float) -> tuple[bool, bool, float, int]:
        """Say where a piece stands among others; the lowest one runs."""
        shares = self._shares
        is_forward = work.kind is Kind.FORWARD
        return shares.is_over(work.peer, now_s), is_forward, -shares.balance_s(work.peer, now_s), work.arrival

    def _settle(self, piece: _Piece, eligible: Sequence[Waiting], now_s: float) -> None:
        """Charge a piece that has run: what it took, and how long it kept another peer's decode step waiting."""
        self._piece = None
        self._led_since_piece.clear()
        ended_s = now_s if piece.ended_s is None else piece.ended_s
        kept_waiting = (
            ended_s - max(work.since_s, piece.started_s)
            for work in eligible
            if work.kind is Kind.DECODE and work.num_tokens and work.peer != piece.peer
        )
        delay_s = max(0.0, max(kept_waiting, default=0.0))
        self._shares.charge(piece.peer, max(0.0, ended_s - piece.started_s), delay_s, now_s)
        self._shares.forget(now_s)
        self._led_at = {peer: turn for peer, turn in self._led_at.items() if peer in self._shares}


def _oldest_of_each_session(waiting: Sequence[Waiting]) -> list[Waiting]:
    seen: set[int] = set()
    eligible = []
    for work in waiting:
        if work.session is None:
            eligible.append(work)
        elif work.session not in seen:
            seen.add(work.session)
            eligible.append(work)
    return eligible
