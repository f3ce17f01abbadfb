"""Pure: which of the waiting work runs on the device next.

Rules:

    - Work of a session runs in the order in which it came; only the oldest of each session may be chosen.
    - Allocations run at once: they cost nothing, but for the copy of a prefix that is known.
    - Decode steps (of one token, or of none) run together when they are of one group, which says that the runner can
      compute them in one forward. The oldest waiting step chooses the group, others of the group join in order of
      arrival as far as they fit.
    - Everything else is cut into pieces, and a piece is what one chunk of a prefill costs. A prefill is cut by tokens,
      a stateless forward by blocks, so that it needs no cache. One token of a session with many rows, or one block of
      a long forward, is the smallest piece that there is.
    - After a piece, every decode step that waits by then runs before the next piece. So no step waits for more than
      one piece, and steps that keep coming cannot hold up the pieces.
    - Prefills come before forwards, and within its kind the oldest first, to its end. So that forwards are not starved,
      they get one of every `forward_every` pieces.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import Enum


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


@dataclass(frozen=True, slots=True)
class Waiting:
    """Work that waits, or of which some pieces are through. `arrival` numbers work in the order in which it came.

    `session` is None for a forward. `num_tokens` are those that are left, in each row; `num_blocks` are the blocks of a
    forward that are left. `position` counts the tokens that are cached. `group` matters to decode steps only.
    """

    arrival: int
    kind: Kind
    session: int | None = None
    group: Hashable = None
    num_rows: int = 1
    num_tokens: int = 1
    position: int = 0
    num_blocks: int = 1


@dataclass(frozen=True, slots=True)
class Batch:
    """What runs next. `amount` is how many tokens of a prefill, or blocks of a forward; 0 for the other kinds."""

    kind: Kind
    arrivals: tuple[int, ...]
    amount: int = 0


class Scheduler:
    """Chooses batches; remembers whose turn it is. Only the compute thread uses it."""

    def __init__(self, limits: BatchLimits | None = None) -> None:
        self.limits = limits or BatchLimits()
        self._ran_piece = False
        self._urgent_until = -1
        self._num_prefill_pieces = 0

    def next_batch(self, waiting: Sequence[Waiting]) -> Batch | None:
        """Return what runs next, or None if nothing waits. `waiting` is in order of arrival."""
        eligible = _oldest_of_each_session(waiting)
        if not eligible:
            return None
        if self._ran_piece:
            self._ran_piece = False
            self._urgent_until = waiting[-1].arrival
        by_kind = {kind: [work for work in eligible if work.kind is kind] for kind in Kind}
        if by_kind[Kind.ALLOCATE]:
            return Batch(Kind.ALLOCATE, (by_kind[Kind.ALLOCATE][0].arrival,))
        decodes = by_kind[Kind.DECODE]
        piece = self._next_piece(by_kind[Kind.PREFILL], by_kind[Kind.FORWARD])
        if decodes and (piece is None or decodes[0].arrival <= self._urgent_until):
            return Batch(Kind.DECODE, self._joined(decodes))
        assert piece is not None
        self._ran_piece = True
        self._num_prefill_pieces = self._num_prefill_pieces + 1 if piece.kind is Kind.PREFILL else 0
        return piece

    def _joined(self, decodes: Sequence[Waiting]) -> tuple[int, ...]:
        """Return the oldest decode step and those that run together with it."""
        chosen: list[int] = []
        num_rows, longest = 0, 0
        for work in decodes:
            rows, length = num_rows + work.num_rows, max(longest, work.position + work.num_tokens)
            fits = rows <= self.limits.max_rows and rows * length <= self.limits.max_padded_tokens
            if not chosen or (work.group == decodes[0].group and fits):
                chosen.append(work.arrival)
                num_rows, longest = rows, length
        return tuple(chosen)

    def _next_piece(self, prefills: Sequence[Waiting], forwards: Sequence[Waiting]) -> Batch | None:
        is_forwards_turn = self._num_prefill_pieces >= self.limits.forward_every - 1
        if prefills and not (forwards and is_forwards_turn):
            work = prefills[0]
            amount = max(1, self.limits.chunk_tokens // work.num_rows)
            return Batch(Kind.PREFILL, (work.arrival,), min(amount, work.num_tokens))
        if forwards:
            work = forwards[0]
            # A piece costs what a chunk costs in all of the blocks that the forward has left.
            amount = self.limits.chunk_tokens * work.num_blocks // max(1, work.num_rows * work.num_tokens)
            return Batch(Kind.FORWARD, (work.arrival,), max(1, min(amount, work.num_blocks)))
        return None


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
