"""Routes: how long they take to find, how short they are against the predecessor's, and against the shortest there is.

    python -m bench.routing [--swarms 200] [--rounds 100]

The swarms are made up (`bench/synthetic_swarms.py` says how) from the seeds 0, 1, 2, …; both rules know the same of
them. The last line of the second table knows everything: what no rule can beat.

The other tables let nodes be less and more busy, and let sessions be each other's load: clients from all over open them
in an idle swarm, nodes publish their queues now and then, and all loops are taken at the end.
"""

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

from bench.machine import describe_machine
from bench.synthetic_swarms import (
    MAX_BUSY,
    Place,
    SyntheticSwarm,
    make_swarm,
    place_peer,
    predecessor_route,
    wait_s,
)
from swarm_client.routing.costs import SLACK, CostModel, RouteWish, Way
from swarm_client.routing.find_route import Hop, ModelKey, find_route, find_throughput_route
from swarm_client.routing.swarm_view import SaidPings, SwarmView
from swarm_protocol.ids import PeerId
from swarm_protocol.records import NodeRecord
from swarm_protocol.spans import Span

Route = list[tuple[NodeRecord, Span]]

NUM_SESSIONS = 40
NUM_AT_ONCE = 8
"""Sessions that open between two records of the nodes, all of which see the same swarm."""

USUAL_LOOP_S = 0.25
"""A session keeps a node busy for its step's time in each such time; a node is never busier than 95 %."""


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swarms", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    print(describe_machine(), "\n")
    _print_times(options.rounds)
    _print_loops(options.swarms)
    _print_loads(options.swarms)
    _print_sessions(max(1, options.swarms // 4))
    _print_optimum(options.swarms)


def _print_times(rounds: int) -> None:
    view, model = _large_swarm(1000, 80)
    rng = random.Random(0)
    ways: dict[str, Callable[[], object]] = {
        "route, relayed": lambda: find_route(view, model, RouteWish(1000), rng.choice),
        "route, ring": lambda: find_route(view, model, RouteWish(1000, way=Way.RING), rng.choice),
        "throughput route": lambda: find_throughput_route(view, model, RouteWish(), rng.random),
        "table of published pings, once per look": lambda: SaidPings.of(view.records),
    }
    times_ms: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started_s, started_cpu_s = time.perf_counter(), time.thread_time()
            way()
            ended_s, ended_cpu_s = time.perf_counter(), time.thread_time()
            times_ms[name].append((1000 * (ended_s - started_s), 1000 * (ended_cpu_s - started_cpu_s)))
    print("| 1,000 nodes × 80 blocks | ms, median | 90 % | ms of CPU, median | 90 % |\n|---|---|---|---|---|")
    for name, found in times_ms.items():
        columns = [sorted(column) for column in zip(*found, strict=True)]
        figures = [figure for column in columns for figure in (statistics.median(column), column[int(0.9 * rounds)])]
        print(f"| {name} | {' | '.join(f'{figure:.1f}' for figure in figures)} |")
    print()


def _print_loops(num_swarms: int) -> None:
    found: dict[str, list[float]] = {}
    hops: dict[str, list[int]] = {}
    for seed in range(num_swarms):
        rng = random.Random(seed)
        swarm = make_swarm(seed, rng.randint(40, 160))
        routes = {
            "predecessor's rule": predecessor_route(swarm, with_return=False),
            "the same, with the way back": predecessor_route(swarm, with_return=True),
            "ours, by chance within 7 %": _ours(swarm, SLACK, rng),
            "ours, the shortest": _ours(swarm, 0.0, rng),
            "the shortest there is": _ours(swarm.known_to_all(), 0.0, rng),
        }
        for name, route in routes.items():
            found.setdefault(name, []).append(1000 * swarm.ring_s(route))
            hops.setdefault(name, []).append(len(route))
    base = found["predecessor's rule"]
    print(
        f"| ring, {num_swarms} swarms | ms per loop, median | 90 % | hops, median | against the predecessor's, medians "
        "| median of swarms | longer in |\n|---|---|---|---|---|---|---|"
    )
    for name, loops in found.items():
        ratios = [ours / theirs for ours, theirs in zip(loops, base, strict=True)]
        print(
            f"| {name} | {statistics.median(loops):.0f} | {sorted(loops)[int(0.9 * len(loops))]:.0f} "
            f"| {statistics.median(hops[name]):g} | {statistics.median(loops) / statistics.median(base):.2f} "
            f"| {statistics.median(ratios):.2f} | {sum(ratio > 1.0001 for ratio in ratios)} |"
        )
    print()


def _print_loads(num_swarms: int) -> None:
    """The same for swarms that are less and more busy."""
    print("| nodes busy for at most | predecessor's rule, ms | ours, ms | ratio |\n|---|---|---|---|")
    for max_busy in (0.0, 0.5, MAX_BUSY, 0.95):
        theirs, ours = [], []
        for seed in range(num_swarms):
            rng = random.Random(seed)
            swarm = make_swarm(seed, rng.randint(40, 160), max_busy=max_busy)
            theirs.append(1000 * swarm.ring_s(predecessor_route(swarm, with_return=False)))
            ours.append(1000 * swarm.ring_s(_ours(swarm, SLACK, rng)))
        medians = statistics.median(theirs), statistics.median(ours)
        print(f"| {max_busy:.0%} | {medians[0]:.0f} | {medians[1]:.0f} | {medians[1] / medians[0]:.2f} |")
    print()


def _print_sessions(num_swarms: int) -> None:
    """Sessions that are each other's load: what a route costs once all have chosen."""
    rules: dict[str, Callable[[SyntheticSwarm, random.Random], Route]] = {
        "predecessor's rule": lambda swarm, _: predecessor_route(swarm, with_return=False),
        "ours, by chance within 7 %": lambda swarm, rng: _ours(swarm, SLACK, rng),
        "ours, the shortest": lambda swarm, rng: _ours(swarm, 0.0, rng),
    }
    means: dict[str, list[float]] = {name: [] for name in rules}
    for seed in range(num_swarms):
        swarm = make_swarm(seed, random.Random(seed).randint(40, 160), max_busy=0.0)
        for name, rule in rules.items():
            means[name].append(1000 * statistics.mean(_loops_of_sessions(swarm, rule, random.Random(seed))))
    base = statistics.median(means["predecessor's rule"])
    print(
        f"| {NUM_SESSIONS} sessions opened in each of {num_swarms} idle swarms | ms per loop, mean, median of swarms "
        "| ratio |\n|---|---|---|"
    )
    for name, found in means.items():
        print(f"| {name} | {statistics.median(found):.0f} | {statistics.median(found) / base:.2f} |")
    print()


def _loops_of_sessions(
    swarm: SyntheticSwarm, rule: Callable[[SyntheticSwarm, random.Random], Route], rng: random.Random
) -> list[float]:
    """Open sessions from clients all over, `NUM_AT_ONCE` between two records; return the loops of all at the end."""
    busy = dict.fromkeys(swarm.places, 0.0)
    opened: list[tuple[Place, Route]] = []
    for number in range(NUM_SESSIONS):
        if number % NUM_AT_ONCE == 0:
            queue_s = _queues_s(swarm, busy)
        client = place_peer(rng)
        route = rule(swarm.seen_by(client, queue_s, rng), rng)
        opened.append((client, route))
        for record, span in route:
            busy[record.peer_id] += swarm.block_s[record.peer_id] * len(span) / USUAL_LOOP_S
    queue_s = _queues_s(swarm, busy)
    return [swarm.seen_by(client, queue_s, rng).ring_s(route) for client, route in opened]


def _queues_s(swarm: SyntheticSwarm, busy: dict[str, float]) -> dict[str, float]:
    return {
        r.peer_id: wait_s(min(busy[r.peer_id], 0.95), swarm.block_s[r.peer_id] * len(r.span))
        for r in swarm.view.records
    }


def _print_optimum(num_swarms: int) -> None:
    ratios: dict[tuple[Way, float], list[float]] = {}
    for seed in range(num_swarms):
        swarm = make_swarm(10_000 + seed, 6, num_blocks=8, span_scale=0.3)
        for way, slack in itertools.product(Way, (0.0, SLACK)):
            costs = CostModel(swarm.view, RouteWish(way=way))
            least_s = min(costs.route_s(route) for route in _all_routes(swarm.view.records, 8))
            hops = find_route(swarm.view, swarm.model, RouteWish(way=way, slack=slack), random.Random(seed).choice)
            ratios.setdefault((way, slack), []).append(costs.route_s(_with_records(swarm, hops)) / least_s)
    print(f"| against all routes of {num_swarms} swarms of 6 nodes and 8 blocks | mean | longest |\n|---|---|---|")
    for (way, slack), found in ratios.items():
        name = f"{way.value}, {'within 7 %' if slack else 'the shortest'}"
        print(f"| {name} | {statistics.mean(found):.4f} | {max(found):.4f} |")


def _ours(swarm: SyntheticSwarm, slack: float, rng: random.Random) -> Route:
    wish = RouteWish(way=Way.RING, slack=slack)
    return _with_records(swarm, find_route(swarm.view, swarm.model, wish, rng.choice))


def _with_records(swarm: SyntheticSwarm, hops: Sequence[Hop]) -> Route:
    by_peer = {record.peer_id: record for record in swarm.view.records}
    return [(by_peer[hop.peer_id], hop.span) for hop in hops]


def _all_routes(records: Sequence[NodeRecord], num_blocks: int, before: Route | None = None) -> Iterator[Route]:
    """Every route that visits no node twice."""
    path = before or []
    block = path[-1][1].end if path else 0
    if block == num_blocks:
        yield path
        return
    used = {record.peer_id for record, _ in path}
    for record in records:
        if record.start_block <= block < record.end_block and record.peer_id not in used:
            for end in range(block + 1, min(record.end_block, num_blocks) + 1):
                yield from _all_routes(records, num_blocks, [*path, (record, Span(block, end))])


def _large_swarm(num_nodes: int, num_blocks: int) -> tuple[SwarmView, ModelKey]:
    """Nodes with eight published pings each; peer ids are as long as real ones."""
    rng = random.Random(0)
    model = ModelKey("large", "r", num_blocks)
    peers = [PeerId(f"12D3KooW{number:044d}") for number in range(num_nodes)]
    starts = [rng.randint(0, num_blocks - 4) for _ in peers]
    spans = [Span(start, min(num_blocks, start + rng.randint(4, 20))) for start in starts]
    records = []
    for peer, span in zip(peers, spans, strict=True):
        behind = [other for other, there in zip(peers, spans, strict=True) if there.start <= span.end < there.end]
        pings_s = tuple((other, rng.uniform(0.005, 0.25)) for other in rng.sample(behind, min(8, len(behind))))
        records.append(
            NodeRecord(
                peer,
                model.name,
                model.revision,
                span.start,
                span.end,
                "online",
                1,
                0.0,
                30.0,
                (1,),
                "bench",
                "int8",
                "n",
                1 << 20,
                1 << 20,
                "",
                rng.uniform(0.001, 0.01),
                rng.uniform(0.0001, 0.001),
                rng.uniform(0.0, 0.05),
                pings_s,
            )
        )
    return SwarmView(records, {peer: rng.uniform(0.005, 0.3) for peer in peers}), model


if __name__ == "__main__":
    main()
