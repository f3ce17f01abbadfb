"""Pure: choose the nodes that a session, or a forward pass without one, goes through."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from swarm_client.routing.costs import CostModel, RouteWish, Way
from swarm_client.routing.shortest_path import PathProblem, Stretch, packed, varied_path
from swarm_client.routing.swarm_view import SwarmView
from swarm_protocol.errors import MissingBlocksError, RevisionMismatchError
from swarm_protocol.ids import PeerId
from swarm_protocol.records import NodeRecord
from swarm_protocol.spans import Span, uncovered

Links = tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float64]]
"""Sources, targets, and the seconds from one to the other; sorted by target."""

_NO_LINKS: Links = (np.zeros(0, dtype=np.intp), np.zeros(0, dtype=np.intp), np.zeros(0))


@dataclass(frozen=True, slots=True)
class Hop:
    """The blocks that a route runs at one peer; they may be fewer than it serves. What follows is from its record."""

    peer_id: PeerId
    span: Span
    numerics: str = ""
    dtype: str = field(default="", compare=False)
    uplink_bytes_per_s: float | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class ModelKey:
    """Which model a route is for: name and revision in records, the number of blocks, and transformers' model type."""

    name: str
    revision: str
    num_blocks: int
    family: str = ""


def find_route(view: SwarmView, model: ModelKey, wish: RouteWish, choose: Callable[[Sequence[int]], int]) -> list[Hop]:
    """Return the hops of a route for a session: one whose loop takes, by `costs`, hardly longer than the shortest.

    `choose` picks among routes that are nearly as short and have no more hops, so that clients do not herd. A node may
    be entered and left at any block, and comes once. Nodes that `wish` avoids, and those whose record says that too few
    tokens are free, are used only for blocks that nobody else serves: a node that failed or was full a moment ago may
    be well again, and is the one to say so.

    Raises RevisionMismatchError if the blocks are served, but with other weights; MissingBlocksError, which names the
    blocks, if some are not served at all.
    """
    numbers = _serving(view, model, wish)
    records = [view.records[number] for number in numbers]
    costs = CostModel(view, wish)
    nodes = [costs.node(record) for record in records]
    one_way_s = np.array([node.one_way_s for node in nodes])
    sources, targets, links_s = _links(view, numbers, costs, one_way_s) if wish.way is Way.RING else _NO_LINKS
    problem = PathProblem(
        allowed=_allowed(records, model, wish),
        one_way=packed(one_way_s),
        visit=packed([node.visit_s for node in nodes]),
        block=packed([node.block_s for node in nodes]),
        sources=sources,
        targets=targets,
        links=packed(links_s),
    )
    return _hops(records, varied_path(problem, wish.slack, choose), _wanted(model, wish).start)


def find_throughput_route(view: SwarmView, model: ModelKey, wish: RouteWish, draw: Callable[[], float]) -> list[Hop]:
    """Return the hops of a route for work that many clients do at once, as training does; `draw` gives 0 to 1.

    A node's rate is the tokens/s that it has for each of its blocks if all are asked of it alike. At every block each
    node that holds it is chosen in proportion to its rate, so no node is asked for more than its share, and the swarm
    as a whole passes on at least what its weakest block does, the sum of rates there. From block to block a route stays
    at its node as far as these shares allow, so it has no more hops than they need; it may come back to a node.
    Distance counts for nothing: many sequences are under way.

    Raises as `find_route` does.
    """
    records = [view.records[number] for number in _serving(view, model, wish)]
    costs = CostModel(view, wish)
    rates = np.array([1.0 / (max(costs.token_s(r), 1e-9) * len(r.span)) for r in records])
    shares = _allowed(records, model, wish) * rates
    shares /= shares.sum(axis=1, keepdims=True)
    path: list[Stretch] = []
    for block, share in enumerate(shares):
        node = path[-1][0] if path else -1
        if path and draw() * shares[block - 1][node] < share[node]:
            path[-1] = (node, path[-1][1], block + 1)
            continue
        # Those that kept the routes they had lack only the rest of their share.
        wanted = np.maximum(share - shares[block - 1], 0.0) if path else share
        wanted = wanted if wanted.any() else share
        summed = np.cumsum(wanted)
        chosen = int(np.searchsorted(summed, draw() * summed[-1], side="right"))
        path.append((min(chosen, int(np.flatnonzero(wanted)[-1])), block, block + 1))
    return _hops(records, path, _wanted(model, wish).start)


def _serving(view: SwarmView, model: ModelKey, wish: RouteWish) -> list[int]:
    """Return which of the view's records a route can be made of. Raises RevisionMismatchError or MissingBlocksError."""
    records = view.records
    online = [
        number
        for number, r in enumerate(records)
        if r.state == "online" and r.model == model.name and r.peer_id not in wish.blocked
    ]
    wanted = _wanted(model, wish)
    same = [number for number in online if records[number].revision == model.revision]
    holes = _holes([records[number] for number in same], model, wanted)
    if not holes:
        return [number for number in same if _meets(records[number], wanted)]
    if not _holes([records[number] for number in online], model, wanted):
        raise RevisionMismatchError(
            f"the swarm serves {model.name} with other weights: revision {records[online[0]].revision}, "
            f"this client has {model.revision}"
        )
    raise MissingBlocksError(model.name, holes)


def _wanted(model: ModelKey, wish: RouteWish) -> Span:
    return Span(0, model.num_blocks) if wish.span is None else wish.span


def _meets(record: NodeRecord, wanted: Span) -> bool:
    return record.start_block < wanted.end and wanted.start < record.end_block


def _holes(records: Sequence[NodeRecord], model: ModelKey, wanted: Span) -> list[Span]:
    spans = sorted({(r.start_block, r.end_block) for r in records})
    reached = wanted.start
    for start, end in spans:  # mostly there are none, and this tells it soonest
        reached = max(reached, end) if start <= reached else reached
    if reached >= wanted.end:
        return []
    holes = uncovered((Span(*span) for span in spans), model.num_blocks)
    return [hole for hole in holes if hole.start < wanted.end and wanted.start < hole.end]


def _allowed(records: Sequence[NodeRecord], model: ModelKey, wish: RouteWish) -> npt.NDArray[np.bool_]:
    """Return (blocks, nodes): where a node may be used, which is where nobody serves that is to be preferred to it."""
    starts = np.array([r.start_block for r in records])
    ends = np.array([r.end_block for r in records])
    # 0: has room and is not avoided; 1: is avoided; 2: is full
    tiers = np.array([2 if r.free_tokens < wish.needed_tokens else int(r.peer_id in wish.avoided) for r in records])
    wanted = _wanted(model, wish)
    blocks = np.arange(wanted.start, wanted.end)[:, None]
    tiers = np.where((starts <= blocks) & (blocks < ends), tiers, 3)
    allowed: npt.NDArray[np.bool_] = (tiers == tiers.min(axis=1, keepdims=True)) & (tiers < 3)
    return allowed


def _links(view: SwarmView, numbers: Sequence[int], costs: CostModel, one_way_s: npt.NDArray[np.float64]) -> Links:
    """Return the measured ways between nodes that a route may take and that beat the way through the client."""
    indices = np.full(len(view.records), -1, dtype=np.intp)
    indices[list(numbers)] = np.arange(len(numbers))
    records = [view.records[number] for number in numbers]
    near, far = indices[view.said.near], indices[view.said.far]
    is_known = (near >= 0) & (far >= 0) & (near != far)
    near, far = near[is_known], far[is_known]
    links_s = costs.believed_pings_s(records, near, far, view.said.pings_s[is_known]) / 2
    sources, targets, links_s = np.concatenate((near, far)), np.concatenate((far, near)), np.tile(links_s, 2)
    starts, ends = np.array([r.start_block for r in records]), np.array([r.end_block for r in records])
    can_follow = np.maximum(starts[sources] + 1, starts[targets]) <= np.minimum(ends[sources], ends[targets] - 1)
    used = np.flatnonzero(can_follow & (links_s < one_way_s[sources] + one_way_s[targets]))
    used = used[np.argsort(targets[used], kind="stable")]
    return sources[used], targets[used], links_s[used]


def _hops(records: Sequence[NodeRecord], path: Sequence[Stretch], first_block: int) -> list[Hop]:
    return [
        Hop(
            PeerId(record.peer_id),
            Span(first_block + start, first_block + end),
            record.numerics,
            record.dtype,
            record.uplink_bytes_per_s,
        )
        for record, start, end in ((records[node], start, end) for node, start, end in path)
    ]
