"""Placement: how much of what a swarm could do it does, by our rule, by the predecessor's, and at best.

    python -m bench.placement [--swarms 200] [--brute-swarms 100] [--variant-swarms 60] [--processes 2]

The swarms are made up from the seeds 0, 1, 2, …; `bench/placement_swarms.py` says how. What counts is the weakest
block's tokens/s, as a share of what no placement can pass ("bound": all capacity spread evenly, as far as memory
allows), or of the best that annealing finds with the same nodes (`bench/placement_best.py`).
"""

import argparse
import multiprocessing
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

from bench.machine import describe_machine
from bench.placement_best import anneal, optimum
from bench.placement_swarms import OurRule, Outcome, PredecessorsRule, bound, live_through, make_swarm
from server_node.placement import Holder, layout_of

SIZES = ((3, 10), (11, 30), (31, 100), (101, 1000))

VARIANTS: dict[str, Callable[[], OurRule]] = {
    "the rule": OurRule,
    "a gain of 1.15": partial(OurRule, 1.15),
    "a gain of 1.10": partial(OurRule, 1.10),
    "a gain of 1.05": partial(OurRule, 1.05),
    "all blocks that fit": partial(OurRule, holds_all_that_fits=True),
    "others' memory unknown": partial(OurRule, is_memory_known=False),
}


@dataclass(frozen=True, slots=True)
class Shares:
    """The weakest block after joins, at rest, and at rest after churn, over the bound; 1.0 where the bound is 0."""

    joined: float
    settled: float
    churned: float


@dataclass(frozen=True, slots=True)
class Row:
    """What a swarm came to."""

    num_nodes: int
    ours: Shares
    theirs: Shares
    best: Shares
    our_life: Outcome
    their_life: Outcome
    anneal_s: float


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swarms", type=int, default=200)
    parser.add_argument("--brute-swarms", type=int, default=100)
    parser.add_argument("--variant-swarms", type=int, default=60)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    print(describe_machine(), "\n", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, context) as pool:
        rows = list(pool.map(measure, range(options.swarms)))
        _print_shares(rows)
        _print_best(rows)
        _print_moves(rows)
        _print_brute(list(pool.map(measure_brute, range(options.brute_swarms))))
        _print_variants(rows[: options.variant_swarms], pool)


def measure(seed: int) -> Row:
    """Let the swarm of `seed` live by both rules, and find its best placements."""
    swarm = make_swarm(seed)
    ours, theirs = live_through(swarm, OurRule), live_through(swarm, PredecessorsRule)
    bounds = [bound(ours.joined, swarm.num_blocks), bound(ours.churned, swarm.num_blocks)]
    # All rules have the same nodes at all times; so has the best, which may begin where each of them ended.
    num_steps = min(40_000, max(8_000, 40 * len(swarm.first)))
    first, first_s = anneal([ours.joined, ours.settled], swarm.num_blocks, num_steps, seed)
    second, second_s = anneal([ours.churned, theirs.churned], swarm.num_blocks, num_steps, seed)
    return Row(
        len(swarm.first),
        _shares(ours, swarm.num_blocks, bounds),
        _shares(theirs, swarm.num_blocks, bounds),
        Shares(_share(first, bounds[0]), _share(first, bounds[0]), _share(second, bounds[1])),
        ours,
        theirs,
        first_s + second_s,
    )


def measure_variant(name: str, seed: int) -> tuple[Shares, float]:
    """Return the shares of the bound that a variant of our rule comes to, and its moves per node of the busier hour."""
    swarm = make_swarm(seed)
    life = live_through(swarm, VARIANTS[name])
    bounds = [bound(life.joined, swarm.num_blocks), bound(life.churned, swarm.num_blocks)]
    moves = max(life.moves_settling.in_first_hour, life.moves_after_churn.in_first_hour)
    return _shares(life, swarm.num_blocks, bounds), moves


def measure_brute(seed: int) -> tuple[float, float]:
    """Return the weakest blocks of a tiny swarm after joins and at rest, over the best of all placements."""
    swarm = make_swarm(1000 + seed, num_nodes=3 + seed % 6, num_blocks=5 + seed % 4)
    life = live_through(swarm, OurRule)
    joined, settled = (layout_of(swarm.num_blocks, holders).weakest for holders in (life.joined, life.settled))
    best = optimum(life.joined, swarm.num_blocks, max(joined, settled))
    return joined / best, settled / best


def _shares(life: Outcome, num_blocks: int, bounds: Sequence[float]) -> Shares:
    def share(holders: list[Holder], of: float) -> float:
        return _share(layout_of(num_blocks, holders).weakest, of)

    return Shares(share(life.joined, bounds[0]), share(life.settled, bounds[0]), share(life.churned, bounds[1]))


def _share(value: float, of: float) -> float:
    return value / of if of else 1.0


def _print_shares(rows: list[Row]) -> None:
    print(
        "| nodes at first | swarms | what | joins, mean | worst | settled, mean | worst | after churn, mean | worst |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for least, most in (*SIZES, (3, 1000)):
        some = [row for row in rows if least <= row.num_nodes <= most]
        if not some:
            continue
        of_bound: dict[str, Callable[[Row], Shares]] = {
            "ours / bound": lambda row: row.ours,
            "predecessor's / bound": lambda row: row.theirs,
            "annealing / bound": lambda row: row.best,
            "ours / annealing": lambda row: _ratio(row.ours, row.best),
            "predecessor's / annealing": lambda row: _ratio(row.theirs, row.best),
        }
        for name, shares_of in of_bound.items():
            shares = [shares_of(row) for row in some]
            columns = [[s.joined for s in shares], [s.settled for s in shares], [s.churned for s in shares]]
            figures = " | ".join(f"{statistics.mean(column):.3f} | {min(column):.2f}" for column in columns)
            print(f"| {least}–{most} | {len(some)} | {name} | {figures} |")
    print(flush=True)


def _ratio(shares: Shares, best: Shares) -> Shares:
    return Shares(
        _share(shares.joined, best.joined), _share(shares.settled, best.settled), _share(shares.churned, best.churned)
    )


def _print_best(rows: list[Row]) -> None:
    seconds = sorted(row.anneal_s for row in rows)
    print(f"Annealing took {statistics.median(seconds):.1f} s per swarm in the median, {seconds[-1]:.1f} s at most.\n")


def _print_moves(rows: list[Row]) -> None:
    print(
        "| moves per node-hour | 4 h after joins, mean | most | first hour, mean | most | 1 h of churn, mean | most |"
    )
    print("|---|---|---|---|---|---|---|")
    lives = {"ours": [row.our_life for row in rows], "predecessor's": [row.their_life for row in rows]}
    for name, some in lives.items():
        columns = [
            [life.moves_settling.in_four_hours for life in some],
            [life.moves_settling.in_first_hour for life in some],
            [life.moves_in_churn for life in some],
        ]
        print(f"| {name} | {' | '.join(f'{statistics.mean(column):.3f} | {max(column):.2f}' for column in columns)} |")
    for name, some in lives.items():
        after = [life.moves_after_churn.in_first_hour for life in some]
        print(f"{name}: {statistics.mean(after):.3f} moves per node in the hour after churn, {max(after):.2f} at most;")
        minutes = 60 * statistics.mean(life.hours_missing for life in some)
        print(f"during the churn a block was missing for {minutes:.1f} minutes in the mean.")
    print(flush=True)


def _print_brute(shares: list[tuple[float, float]]) -> None:
    if not shares:
        return
    print(
        f"| {len(shares)} swarms of 3–8 nodes, 5–8 blocks, over the best there is | mean | worst | exactly the best |"
    )
    print("|---|---|---|---|")
    for name, found in (("joins", [joined for joined, _ in shares]), ("settled", [settled for _, settled in shares])):
        num_best = sum(share > 1 - 1e-6 for share in found)
        print(f"| {name} | {statistics.mean(found):.3f} | {min(found):.2f} | {num_best} |")
    print(flush=True)


def _print_variants(rows: list[Row], pool: ProcessPoolExecutor) -> None:
    if not rows:
        return
    print(
        f"| over annealing, {len(rows)} swarms | joins, mean | settled, mean | worst | after churn, mean | worst |",
        end="",
    )
    print(" moves per node, first hour at rest, mean | most |\n|---|---|---|---|---|---|---|---|")
    for name in VARIANTS:
        found = list(pool.map(partial(measure_variant, name), range(len(rows))))
        # Some settle better than the annealing, which began where the rule had ended: then they are the best known.
        joined = [_share(shares.joined, row.best.joined) for (shares, _), row in zip(found, rows, strict=True)]
        settled = [
            min(1.0, _share(shares.settled, row.best.settled)) for (shares, _), row in zip(found, rows, strict=True)
        ]
        churned = [
            min(1.0, _share(shares.churned, row.best.churned)) for (shares, _), row in zip(found, rows, strict=True)
        ]
        moves = [each for _, each in found]
        print(
            f"| {name} | {statistics.mean(joined):.3f} | {statistics.mean(settled):.3f} | {min(settled):.2f} | "
            f"{statistics.mean(churned):.3f} | {min(churned):.2f} | {statistics.mean(moves):.3f} | {max(moves):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
