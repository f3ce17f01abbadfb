"""Swarms made up for comparing routes, each by its seed, and the rule of the predecessor for choosing one.

Where: four regions on a plane of one-way milliseconds, so that round trips between their centres are near those between
the regions of cloud providers (Europe to the US east 80 ms, to the US west 140, to East Asia 250; US west to East Asia
120). Nodes and clients are scattered round the centres (standard deviation 5 ms), and each has a last mile of its own
(log-normal, median 4 ms one way, as home connections have), which every way to and from it includes.

How fast: four kinds of GPU and a model of 80 blocks of 0.9 GB. A decode step reads a block's weights once, at about
half of the memory's bandwidth; the span is what fits into the memory beside the KV cache.

What they hold: nodes come one after the other and take the blocks that are held least.

How busy: each node is busy for a share of the time that is uniform between 0 and 0.85, and a step waits as in a queue
with one server and equal jobs (M/D/1), a job being a step through the whole span.

What is known: clients have pinged all nodes, nodes up to eight neighbours, chosen as nodes do. All figures that are
known are off by some per cent (log-normal; 10 % for pings and speeds, 30 % for queues), and the true ones decide.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from server_node.admission import ServedSpan
from server_node.neighbours import choose_neighbours, neighbours_among
from swarm_client.routing.costs import HOP_S
from swarm_client.routing.find_route import ModelKey
from swarm_client.routing.swarm_view import SaidPings, SwarmView
from swarm_protocol.ids import PeerId
from swarm_protocol.records import MAX_PINGS, NodeRecord
from swarm_protocol.spans import Span

REGIONS = ((0.35, 0.0, 0.0), (0.25, 0.040, 0.0), (0.20, 0.070, 0.0), (0.20, 0.120, 0.035))
"""Share of the peers, and where: Europe, US east, US west, East Asia."""

GPUS = ((0.10, 0.0010, 30, 60), (0.40, 0.0016, 10, 20), (0.35, 0.0045, 6, 12), (0.15, 0.0100, 3, 6))
"""Share of the nodes, seconds per block, and blocks held from and to: 80 GB, 24 GB, 12 to 16 GB, 8 GB."""

MAX_BUSY = 0.85

PREDECESSOR_HOP_S = 0.018
PREDECESSOR_UNKNOWN_S = 0.15


@dataclass(frozen=True, slots=True)
class Place:
    """Where a peer is, in seconds, and its last mile."""

    x: float
    y: float
    last_mile_s: float


@dataclass(frozen=True, slots=True)
class SyntheticSwarm:
    """What is true, by peer, and what a client knows of it."""

    model: ModelKey
    view: SwarmView
    client: Place
    places: dict[str, Place]
    block_s: dict[str, float]
    queue_s: dict[str, float]

    def ring_s(self, route: list[tuple[NodeRecord, Span]]) -> float:
        """Return how long a step truly takes round the ring of `route`."""
        here, total = self.client, 0.0
        for record, span in route:
            peer = record.peer_id
            total += one_way_s(here, self.places[peer]) + HOP_S + self.queue_s[peer] + self.block_s[peer] * len(span)
            here = self.places[peer]
        return total + one_way_s(here, self.client)

    def known_to_all(self) -> "SyntheticSwarm":
        """Return the same swarm with all that is true known, the ways between all nodes included."""
        records = [
            replace(record, block_step_s=self.block_s[record.peer_id], queue_s=self.queue_s[record.peer_id], pings_s=())
            for record in self.view.records
        ]
        places = [self.places[record.peer_id] for record in records]
        near, far = np.nonzero(~np.eye(len(records), dtype=bool))
        pings_s = np.array([2 * one_way_s(places[a], places[b]) for a, b in zip(near, far, strict=True)])
        own_s = {PeerId(peer): 2 * one_way_s(self.client, place) for peer, place in self.places.items()}
        return replace(self, view=SwarmView(records, own_s, None, SaidPings(near, far, pings_s)))

    def seen_by(self, client: Place, queue_s: dict[str, float], rng: random.Random) -> "SyntheticSwarm":
        """Return the same swarm with other queues, as another client sees it."""
        records = [replace(record, queue_s=queue_s[record.peer_id]) for record in self.view.records]
        pings_s = {PeerId(p): 2 * one_way_s(client, place) * _error(rng, 0.1) for p, place in self.places.items()}
        view = SwarmView(records, pings_s, None, self.view.said)
        return replace(self, view=view, client=client, queue_s=queue_s)


def one_way_s(one: Place, other: Place) -> float:
    """Return the seconds from one place to another."""
    return math.hypot(one.x - other.x, one.y - other.y) + one.last_mile_s + other.last_mile_s


def wait_s(busy: float, service_s: float) -> float:
    """Return the mean wait in an M/D/1 queue whose server is busy for this share of the time."""
    return busy / (2 * (1 - busy)) * service_s


def make_swarm(
    seed: int, num_nodes: int, num_blocks: int = 80, span_scale: float = 1.0, max_busy: float = MAX_BUSY
) -> SyntheticSwarm:
    """Return the swarm of `seed`; with `span_scale` below 1 its nodes hold less, for small models."""
    rng = random.Random(seed)
    model = ModelKey("synthetic", "r", num_blocks)
    spans: dict[str, Span] = {}
    block_s: dict[str, float] = {}
    queue_s: dict[str, float] = {}
    while len(spans) < num_nodes or any(not _holds(spans, block) for block in range(num_blocks)):
        peer = f"node{len(spans)}"
        _, kind_s, least, most = rng.choices(GPUS, [share for share, *_ in GPUS])[0]
        length = max(1, min(num_blocks, round(rng.randint(least, most) * span_scale)))
        spans[peer] = _least_held(num_blocks, length, list(spans.values()))
        block_s[peer] = kind_s * rng.lognormvariate(0.0, 0.15)
        queue_s[peer] = wait_s(rng.uniform(0.0, max_busy), block_s[peer] * length)
    places = {peer: place_peer(rng) for peer in spans}
    client = place_peer(rng)
    pings_s = {peer: 2 * one_way_s(client, place) * _error(rng, 0.1) for peer, place in places.items()}
    records = [_record(peer, span, block_s[peer] * _error(rng, 0.1), queue_s[peer] * _error(rng, 0.3), model)
               for peer, span in spans.items()]  # fmt: skip
    records = [_with_pings(record, records, places, model, rng) for record in records]
    view = SwarmView(records, {PeerId(peer): ping_s for peer, ping_s in pings_s.items()})
    return SyntheticSwarm(model, view, client, places, block_s, queue_s)


def _least_held(num_blocks: int, length: int, held: Sequence[Span]) -> Span:
    holders = [sum(span.start <= block < span.end for span in held) for block in range(num_blocks)]
    start = min(range(num_blocks - length + 1), key=lambda first: sorted(holders[first : first + length]))
    return Span(start, start + length)


def predecessor_route(swarm: SyntheticSwarm, *, with_return: bool) -> list[tuple[NodeRecord, Span]]:
    """Return the route of the predecessor's rule, exactly the shortest by its costs.

    Half a ping and 18 ms for each hop, 0.15 s for a ping that is not known, the time of the blocks, nothing for load; a
    node is left only at the end of its span. Its way back from the last node counts only `with_return`.
    """
    num_blocks = swarm.model.num_blocks
    records = sorted(swarm.view.records, key=lambda record: record.end_block)
    pings_s = swarm.view.pings_s
    best: dict[str, tuple[float, list[tuple[NodeRecord, Span]]]] = {}
    ending: dict[int, list[NodeRecord]] = {}
    for record in records:
        found: list[tuple[float, list[tuple[NodeRecord, Span]]]] = []
        compute_s = record.block_step_s or 0.0
        if record.start_block == 0:
            out_s = pings_s.get(PeerId(record.peer_id), PREDECESSOR_UNKNOWN_S) / 2 + PREDECESSOR_HOP_S
            found.append((out_s + compute_s * record.end_block, [(record, Span(0, record.end_block))]))
        for block in range(max(1, record.start_block), record.end_block):
            for before in ending.get(block, ()):
                if before.peer_id in best:
                    cost_s, path = best[before.peer_id]
                    cost_s += dict(before.pings_s).get(record.peer_id, PREDECESSOR_UNKNOWN_S) / 2 + PREDECESSOR_HOP_S
                    cost_s += compute_s * (record.end_block - block)
                    found.append((cost_s, [*path, (record, Span(block, record.end_block))]))
        if found:
            best[record.peer_id] = min(found, key=lambda entry: entry[0])
            ending.setdefault(record.end_block, []).append(record)
    complete = [
        (cost_s + (pings_s.get(PeerId(record.peer_id), PREDECESSOR_UNKNOWN_S) / 2 if with_return else 0.0), path)
        for record in ending[num_blocks]
        for cost_s, path in [best[record.peer_id]]
    ]
    return min(complete, key=lambda entry: entry[0])[1]


def _holds(spans: dict[str, Span], block: int) -> bool:
    return any(span.start <= block < span.end for span in spans.values())


def place_peer(rng: random.Random) -> Place:
    """Return where a node or a client is."""
    _, x, y = rng.choices(REGIONS, [share for share, *_ in REGIONS])[0]
    return Place(rng.gauss(x, 0.005), rng.gauss(y, 0.005), rng.lognormvariate(math.log(0.004), 0.5))


def _error(rng: random.Random, sigma: float) -> float:
    return rng.lognormvariate(0.0, sigma)


def _record(peer: str, span: Span, block_s: float, queue_s: float, model: ModelKey) -> NodeRecord:
    return NodeRecord(
        peer, model.name, model.revision, span.start, span.end, "online", 1, 0.0, 30.0, (1,), "bench", "int8", "n",
        1 << 20, 1 << 20, block_step_s=block_s, queue_s=queue_s,
    )  # fmt: skip


def _with_pings(
    record: NodeRecord, records: list[NodeRecord], places: dict[str, Place], model: ModelKey, rng: random.Random
) -> NodeRecord:
    """Let a node ping its neighbours for some rounds."""
    served = ServedSpan(model.name, model.revision, record.span, 0, "int8", 0)
    neighbours = [peer for peer in neighbours_among(records, served) if peer != record.peer_id]
    known_s: dict[PeerId, float] = {}
    for _ in range(5):
        for peer in choose_neighbours(neighbours, known_s, rng.sample):
            known_s[peer] = 2 * one_way_s(places[record.peer_id], places[peer]) * _error(rng, 0.1)
    nearest = sorted(known_s.items(), key=lambda item: item[1])[:MAX_PINGS]
    return replace(record, pings_s=tuple(nearest))
