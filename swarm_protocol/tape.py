"""What went into one hop of a session, kept so that another node can be given it when the hop's node dies."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from swarm_protocol.errors import TapeLostError
from swarm_protocol.messages import WireTensor
from swarm_protocol.prefix_tapes import PrefixTapes
from swarm_protocol.tensors import joined_tokens, token_part
from swarm_protocol.wire_tensor import own_copy

PREFIX_SHARE = 0.25
"""Of what tapes may take: as much again, for prompts that begin alike."""


@dataclass(slots=True, weakref_slot=True)
class TapeBudget:
    """What some tapes may take together, and what they share; `whole` is what these may take with others."""

    max_bytes: int
    whole: "TapeBudget | None" = None
    used_bytes: int = 0
    prefixes: PrefixTapes = field(init=False)

    def __post_init__(self) -> None:
        self.prefixes = PrefixTapes(int(PREFIX_SHARE * self.max_bytes)) if self.whole is None else self.whole.prefixes

    def take(self, num_bytes: int) -> bool:
        """Count `num_bytes` if they fit; return whether they did. Fewer than none always fit."""
        if num_bytes > 0 and self.used_bytes + num_bytes > self.max_bytes:
            return False
        if self.whole is not None and not self.whole.take(num_bytes):
            return False
        self.used_bytes += num_bytes
        return True


class Tape:
    """Hidden states (batch, n, hidden) in the order of their positions: what the node's cache was made of.

    Whatever is rolled back or permuted at the node is so here. A tape that does not fit into the budget drops what it
    has and stays empty until it is cut to 0; `is_whole` says so.
    """

    def __init__(self, budget: TapeBudget) -> None:
        self.budget = budget
        self._parts: list[WireTensor] = []
        # How many of them, at the beginning, are not this tape's own, and count for nothing.
        self._num_shared = 0
        # Permutations of the rows, oldest first, each with the number of parts that were there.
        self._orders: list[tuple[int, tuple[int, ...]]] = []
        self._num_bytes = 0
        self.length = 0
        self.is_whole = True

    def begin_with(self, pages: Sequence[WireTensor]) -> None:
        """Begin with pages that others have, too."""
        self._parts = list(pages)
        self._num_shared = len(pages)
        self.length = sum(page.shape[1] for page in pages)

    def write(self, position: int, states: WireTensor) -> None:
        """Forget what is behind `position` and add what comes there. A hole before it makes the tape useless."""
        self.cut(position)
        if self.length < position:
            self._empty()
            self.is_whole, self.length = False, position
        self.length += states.shape[1]
        if self.is_whole and memoryview(states.data).nbytes:
            self._add(states)

    def reorder(self, row_order: tuple[int, ...]) -> None:
        """Let row i continue what row `row_order[i]` was."""
        if self._parts:
            self._orders.append((len(self._parts), row_order))

    def cut(self, length: int) -> None:
        """Forget what is behind the first `length` tokens."""
        while self._parts and self.length > length:
            last = self._parts.pop()
            if len(self._parts) < self._num_shared:
                self._num_shared = len(self._parts)
            else:
                self._take(-memoryview(last.data).nbytes)
            self.length -= last.shape[1]
            if self.length < length:
                self._add(own_copy(token_part(last, 0, length - self.length)))
                self.length = length
        self.length = min(self.length, length)
        self._orders = [(min(count, len(self._parts)), order) for count, order in self._orders if self._parts]
        self.is_whole = self.is_whole or not length

    def part(self, start: int, end: int) -> WireTensor:
        """Return the tokens from `start` to `end`, one or more. Raises TapeLostError if they are not here."""
        if not (self.is_whole and 0 <= start < end <= self.length):
            raise TapeLostError(f"the tokens {start} to {end} are not on the tape any more")
        pieces, orders, position = list[WireTensor](), list[Sequence[int]](), 0
        for part, order in zip(self._parts, self._row_orders(), strict=True):
            first, last = max(start, position), min(end, position + part.shape[1])
            if first < last:
                pieces.append(token_part(part, first - position, last - position))
                orders.append(order)
            position += part.shape[1]
        return joined_tokens(pieces, orders)

    def drop(self) -> None:
        """Free the memory; the tape is not used any more."""
        self._empty()

    def _row_orders(self) -> list[Sequence[int]]:
        """Return for each part which of its rows each row is by now; nothing if they are as they were."""
        # From the end, since what came later permuted all that was there.
        orders: list[Sequence[int]] = []
        order: Sequence[int] = ()
        left = list(self._orders)
        for index in reversed(range(len(self._parts))):
            while left and left[-1][0] > index:
                _, earlier = left.pop()
                order = [earlier[row] for row in order] if order else earlier
            orders.append(order)
        return orders[::-1]

    def _add(self, states: WireTensor) -> None:
        if self._take(memoryview(states.data).nbytes):
            self._parts.append(states)
        else:
            self._empty()
            self.is_whole = False

    def _take(self, num_bytes: int) -> bool:
        has_room = self.budget.take(num_bytes)
        self._num_bytes += num_bytes if has_room else 0
        return has_room

    def _empty(self) -> None:
        self.budget.take(-self._num_bytes)
        self._parts, self._orders, self._num_bytes, self._num_shared = [], [], 0, 0
