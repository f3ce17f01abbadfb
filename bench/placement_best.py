"""The best placements that are found with all time and all power: what `bench.placement` holds the rule against."""

import time
from collections.abc import Iterator

import numpy as np

from server_node.placement import Holder, layout_of
from server_node.placement_search import Layout, weights, window_gains


def anneal(starts: list[list[Holder]], num_blocks: int, num_steps: int, seed: int) -> tuple[float, float]:
    """Return the tokens/s of the weakest block after annealing from each of `starts` in turn, and the seconds it took.

    A random node is taken out and put into a window that is drawn by what it leaves, ever more strictly (heat bath);
    all nodes may move at any time, owners and holes notwithstanding. The best ever met counts, `starts` included.
    """
    begin_s, best = time.monotonic(), 0.0
    rng = np.random.default_rng(seed)
    for holders in starts:
        layout = layout_of(num_blocks, holders)
        best = max(best, layout.weakest)
        for step in range(num_steps // len(starts)):
            _anneal_step(layout, step / num_steps * len(starts), rng)
            best = max(best, layout.weakest)
    return best, time.monotonic() - begin_s


def _anneal_step(layout: Layout, done: float, rng: np.random.Generator) -> None:
    """Draw a window for a random node; `done` of the annealing is over."""
    sharpness = 4.0 * 12.5**done
    temperature = 0.5 * 0.004**done
    node = int(rng.integers(len(layout.rates)))
    layout.take_out(node)
    gains = window_gains(layout, float(layout.rates[node]), 1, int(layout.most[node]), sharpness)
    total = float(weights(layout.load, layout.num_holders, sharpness, layout.fair_share).sum())
    # The chance of a window is what it leaves to the power of -1 / temperature, drawn by Gumbel noise.
    left = np.log(np.maximum(total - gains, 1e-300)) / temperature
    noisy = np.where(gains >= 0, rng.gumbel(size=gains.shape) - left, -np.inf)
    row, start = divmod(int(noisy.argmax()), layout.num_blocks)
    layout.put_in(node, start, 1 + row)


def optimum(holders: list[Holder], num_blocks: int, known: float) -> float:
    """Return the tokens/s of the weakest block in the best of all placements, `known` if none is better.

    Tries all windows of all nodes, and leaves out what wastes more than there is to spare.
    """
    layout = layout_of(num_blocks, holders)
    order = np.argsort(-layout.rates)
    rates, most = layout.rates[order].tolist(), layout.most[order].tolist()
    best = known
    while (found := _better(rates, most, num_blocks, best * (1 + 1e-6))) is not None:
        best = found
    return best


def _better(rates: list[float], most: list[int], num_blocks: int, goal: float) -> float | None:
    """Return the weakest block of any placement that gives `goal` to all blocks, None if there is none."""
    usable = [min(rate, count * goal) for rate, count in zip(rates, most, strict=True)]
    usable_after = [sum(usable[node:]) for node in range(len(rates) + 1)]

    def place(node: int, load: list[float]) -> float | None:
        lacking = sum(max(0.0, goal - value) for value in load)
        if lacking > usable_after[node]:
            return None
        if node == len(rates):
            return min(load)
        for window in _windows(most[node], num_blocks):
            more = rates[node] / len(window)
            found = place(node + 1, [value + more if b in window else value for b, value in enumerate(load)])
            if found is not None:
                return found
        return None

    return place(0, [0.0] * num_blocks)


def _windows(most: int, num_blocks: int) -> Iterator[range]:
    for length in range(most, 0, -1):
        for start in range(num_blocks - length + 1):
            yield range(start, start + length)
