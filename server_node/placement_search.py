"""Pure: where the blocks of a swarm's nodes would lie best, found by local search.

A node that computes `rate` blocks a second and holds n of them passes rate / n tokens/s on at each, and the rates of
those that hold the same block add up. A chain of blocks is as fast as its weakest one. What is compared is not the
weakest alone but a sum over all blocks in which weak ones weigh most, exp(-sharpness * load / fair share): a step that
helps one of several weak blocks counts, and capacity that is given to a strong block is not given for nothing. Blocks
that nobody holds come before everything else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

JOIN_SHARPNESS = 14.0
"""From 10 to 20 joins end alike; with 6 the worst of 86 swarms was weaker, with 50 all were, by 3 %."""

PLAN_SHARPNESS = (3.0, 6.0, 12.0, 25.0, 50.0)
"""First all blocks count nearly alike, last the weakest: ends 1 to 2 % higher than one sharpness alone."""

_HOLE = 1e3
"""What a block without any node weighs; others weigh at most 1."""

MAX_EVALUATIONS = 10_000
"""Looks for a window in one search of a small swarm: 0.4 s. Of 3,000 the weakest block was 1.5 % weaker."""

_GOOD_ENOUGH = 0.97
"""Share of what no layout can pass at which a search ends."""

_TOLERANCE = 0.01
"""Shares within which windows count as equal; with five times as much, joins ended 4 % lower for the sake of hops."""

_SWEEPS = 6
_LEAST_GAIN = 1e-3
"""Share of the sum that a step has to take away: what is smaller would only shuffle nodes."""


@dataclass(slots=True)
class Layout:
    """Who holds what: node i computes `rates[i]` blocks/s and holds `lengths[i]` blocks from `starts[i]` on.

    `least` and `most` bound its number of blocks. `load` is what each block gets in tokens/s, from `num_holders` nodes.
    """

    num_blocks: int
    rates: Floats
    least: Ints
    most: Ints
    starts: Ints
    lengths: Ints
    load: Floats
    num_holders: Ints
    fair_share: float
    """Tokens/s of every block if all capacity were spread evenly."""

    @classmethod
    def of(cls, num_blocks: int, rates: Floats, least: Ints, most: Ints, starts: Ints, lengths: Ints) -> "Layout":
        """Return the layout of these nodes; the loads are computed."""
        blocks = np.arange(num_blocks)
        holds = (starts[:, None] <= blocks) & (blocks < (starts + lengths)[:, None])
        load = (holds * (rates / lengths)[:, None]).sum(axis=0, dtype=np.float64)
        fair_share = float(rates.sum()) / num_blocks
        return cls(num_blocks, rates, least, most, starts, lengths, load, holds.sum(axis=0), fair_share)

    def copy(self) -> "Layout":
        """Return a layout whose nodes can be moved without moving those of this one."""
        return Layout.of(self.num_blocks, self.rates, self.least, self.most, self.starts.copy(), self.lengths.copy())

    @property
    def weakest(self) -> float:
        """Tokens/s of the weakest block, exactly 0 if one has no node."""
        return float(self.load.min()) if self.num_holders.all() else 0.0

    @property
    def quality(self) -> tuple[int, float]:
        """What makes one layout better than another: fewer blocks without a node, then a stronger weakest block."""
        return int(np.count_nonzero(self.num_holders)), self.weakest

    def take_out(self, node: int) -> None:
        """Take the blocks of `node` away; nothing but `put_in` may follow for it."""
        self._add(node, -1)

    def put_in(self, node: int, start: int, length: int) -> None:
        """Give `length` blocks from `start` on to `node`, which has none."""
        self.starts[node], self.lengths[node] = start, length
        self._add(node, 1)

    def _add(self, node: int, sign: int) -> None:
        window = slice(self.starts[node], self.starts[node] + self.lengths[node])
        self.load[window] += sign * self.rates[node] / self.lengths[node]
        self.num_holders[window] += sign
        if sign < 0:
            self.load[self.num_holders == 0] = 0.0  # no rest of rounding may look like a node


def attainable(rates: Floats, most: Ints, num_blocks: int) -> float:
    """Return the tokens/s of the weakest block that no layout can pass.

    All capacity spread evenly; but of a node that has memory for few blocks no more counts than these blocks can use.
    Of any rate r that all blocks get, a node gives at most min(rate, most * r): the largest r for which that suffices.
    """
    lower, upper = 0.0, float(rates.sum()) / num_blocks
    if int(most.sum()) < num_blocks:
        return 0.0
    if _gives(rates, most, upper) >= num_blocks * upper:
        return upper
    for _ in range(60):
        middle = (lower + upper) / 2
        lower, upper = (middle, upper) if _gives(rates, most, middle) >= num_blocks * middle else (lower, middle)
    return lower


def _gives(rates: Floats, most: Ints, weakest: float) -> float:
    return float(np.minimum(rates, most * weakest).sum())


def weights(load: Floats, num_holders: Ints, sharpness: float, fair_share: float) -> Floats:
    """Return how much each block lacks: 1 and `_HOLE` more if nobody holds it, towards 0 the more it gets."""
    lacks: Floats = np.exp(-sharpness / fair_share * load) + _HOLE * (num_holders == 0)
    return lacks


def window_gains(layout: Layout, rate: float, least: int, most: int, sharpness: float) -> Floats:
    """Return what each window would take from the sum for a node that is not in `layout`; -1 where none fits.

    Rows are lengths from `least` to `most`, columns first blocks.
    """
    num_blocks, fair_share = layout.num_blocks, layout.fair_share
    lengths = np.arange(least, most + 1)
    before = weights(layout.load, layout.num_holders, sharpness, fair_share)
    after = np.exp(-sharpness / fair_share * (layout.load + (rate / lengths)[:, None]))
    sums = np.zeros((len(lengths), num_blocks + 1))
    np.cumsum(before - after, axis=1, out=sums[:, 1:])
    ends, fits = _window_ends(num_blocks, least, most)
    gains: Floats = np.where(fits, sums.ravel()[ends] - sums[:, :-1], -1.0)
    return gains


@lru_cache(maxsize=1024)
def _window_ends(num_blocks: int, least: int, most: int) -> tuple[Ints, NDArray[np.bool_]]:
    """Return where the sums of `window_gains` have the end of each window, all rows in one, and whether it fits."""
    ends = np.arange(num_blocks) + np.arange(least, most + 1)[:, None]
    rows = np.arange(most + 1 - least)[:, None] * (num_blocks + 1)
    return rows + np.minimum(ends, num_blocks), ends <= num_blocks


def equally_good(layout: Layout, gains: Floats, sharpness: float) -> NDArray[np.bool_]:
    """Return for each window of `window_gains` whether it is as good as the best, but for what nobody would notice.

    It leaves no more blocks without a node; it takes nearly as much from the sum, which tells something in a large
    swarm, where one node changes little; and the weak blocks that are left weigh nearly the same, which tells something
    in a small one. Other grounds may then decide.
    """
    total = weights(layout.load, layout.num_holders, sharpness, layout.fair_share).sum()
    num_filled, taken = np.divmod(gains, _HOLE)
    is_full = (gains >= 0) & (num_filled == num_filled.max())
    left = total % _HOLE - taken
    are_equal: NDArray[np.bool_] = (
        is_full
        & (taken >= (1 - _TOLERANCE) * taken[is_full].max())
        & (left <= np.exp(_TOLERANCE * sharpness) * left[is_full].min())
    )
    return are_equal


def best_window(layout: Layout, node: int, sharpness: float) -> tuple[int, int, float]:
    """Return first block, length and gain of the best window for `node`, which is not in `layout` at present."""
    least = int(layout.least[node])
    gains = window_gains(layout, float(layout.rates[node]), least, int(layout.most[node]), sharpness)
    row, start = divmod(int(gains.argmax()), layout.num_blocks)
    return start, least + row, float(gains[row, start])


def improve(layout: Layout, movable: Ints, sharpnesses: tuple[float, ...] = PLAN_SHARPNESS) -> Layout:
    """Return the best layout that is met while nodes move, one by one, to better windows; `layout` is changed.

    Nodes take turns in the order of `movable` until none gains at any sharpness. The best has the fewest blocks without
    a node, then the strongest weakest block.
    """
    best = layout.copy()
    for sharpness in sharpnesses:
        for _ in range(_SWEEPS):
            num_moved = sum(_move(layout, int(node), sharpness) for node in movable)
            if layout.quality > best.quality:
                best = layout.copy()
            if not num_moved:
                break
    return best


def search(
    layout: Layout,
    movable: Ints,
    max_evaluations: int = MAX_EVALUATIONS,
    reachable: Callable[[Layout], Layout] = lambda wanted: wanted,
) -> Layout:
    """Return the best layout that is found by moving the nodes of `movable`; `layout` stays as it is.

    `reachable` says what becomes of a wanted layout, where not every move can be made; that is what is compared.
    After the first descent two nodes at a time are taken out and put back the other way round, and the descent is
    repeated, as long as `max_evaluations` looks for windows last: that is what a small swarm needs, where every node
    stands in the way of others. Nothing is left to chance, so that nodes that see the same swarm find the same.
    """
    best = reachable(improve(layout.copy(), movable))
    goal = attainable(layout.rates, layout.most, layout.num_blocks) * _GOOD_ENOUGH
    num_improvements = max_evaluations // max(1, len(movable) * len(PLAN_SHARPNESS) * 2)
    pairs = ((one, other) for gap in range(1, len(movable)) for one, other in zip(movable, movable[gap:], strict=False))
    for first, second in islice(pairs, num_improvements):
        if best.weakest >= goal:
            break
        trial = best.copy()
        trial.take_out(first)
        trial.take_out(second)
        for node in (second, first):
            start, length, _ = best_window(trial, int(node), JOIN_SHARPNESS)
            trial.put_in(node, start, length)
        found = improve(trial, movable)
        if found.quality > best.quality and (reached := reachable(found)).quality > best.quality:
            best = reached
    return best


def _move(layout: Layout, node: int, sharpness: float) -> bool:
    """Give `node` its best window if that is better than the one it has."""
    old = int(layout.starts[node]), int(layout.lengths[node])
    total = weights(layout.load, layout.num_holders, sharpness, layout.fair_share).sum()
    layout.take_out(node)
    without = weights(layout.load, layout.num_holders, sharpness, layout.fair_share).sum()
    start, length, gain = best_window(layout, node, sharpness)
    is_better = bool(without - gain < total * (1 - _LEAST_GAIN)) and (start, length) != old
    layout.put_in(node, *((start, length) if is_better else old))
    return is_better
