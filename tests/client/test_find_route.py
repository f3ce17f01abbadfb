"""Routes are the shortest by the costs, or nearly; they cover all blocks, and what is missing is named."""

import dataclasses
import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm_client.routing.costs import HOP_S, SLACK, CostModel, RouteWish, Way
from swarm_client.routing.find_route import Hop, ModelKey, find_route
from swarm_client.routing.swarm_view import OwnSpeed, SwarmView
from swarm_protocol.errors import MissingBlocksError, RevisionMismatchError
from swarm_protocol.ids import PeerId
from swarm_protocol.records import NodeRecord
from swarm_protocol.spans import Span, uncovered

MODEL = ModelKey("m", "rev", 10)
MODEL_NAMES = "abcdefgh"


def record(name: str, start: int, end: int, **fields: object) -> NodeRecord:
    plain = NodeRecord(
        name, "m", "rev", start, end, "online", 1, 0.0, 30.0, (1,), "umbel", "float32", "n", 1000, 1000, ""
    )
    return dataclasses.replace(plain, **fields)  # type: ignore[arg-type]


def find(view: SwarmView, wish: RouteWish | None = None, model: ModelKey = MODEL, seed: int = 0) -> list[Hop]:
    return find_route(view, model, wish or RouteWish(), random.Random(seed).choice)


def route(*records: NodeRecord, needed_tokens: int = 10, avoided: set[str] | None = None) -> list[Hop]:
    return find(SwarmView(records), RouteWish(needed_tokens, {PeerId(name) for name in avoided or set()}))


def peers(hops: Sequence[Hop]) -> str:
    return "".join(hop.peer_id for hop in hops)


def away(**pings_s: float) -> dict[PeerId, float]:
    return {PeerId(name): ping_s for name, ping_s in pings_s.items()}


def test_one_node_with_all_blocks_is_a_route() -> None:
    assert route(record("a", 0, 10), record("b", 0, 5)) == [Hop(PeerId("a"), Span(0, 10), "n")]


def test_overlapping_spans_are_cut_where_the_quicker_one_gains() -> None:
    slow, quick = record("a", 0, 6, block_step_s=0.02), record("b", 3, 10, block_step_s=0.01)
    assert route(slow, quick) == [Hop(PeerId("a"), Span(0, 3), "n"), Hop(PeerId("b"), Span(3, 10), "n")]
    quick = dataclasses.replace(quick, block_step_s=0.03)
    assert route(slow, quick) == [Hop(PeerId("a"), Span(0, 6), "n"), Hop(PeerId("b"), Span(6, 10), "n")]


@pytest.mark.parametrize(
    "other",
    [{"state": "joining"}, {"state": "draining"}, {"state": "offline"}, {"model": "another"}],
    ids=["joining", "draining", "offline", "another model"],
)
def test_nodes_that_do_not_serve_are_not_chosen(other: dict[str, object]) -> None:
    with pytest.raises(MissingBlocksError) as caught:
        route(record("a", 0, 4), record("b", 3, 10, **other), record("c", 6, 8))
    assert caught.value.missing == (Span(4, 6), Span(8, 10))


def test_a_blocked_node_is_never_chosen() -> None:
    with pytest.raises(MissingBlocksError):
        find(SwarmView([record("a", 0, 10)]), RouteWish(blocked={PeerId("a")}))


def test_other_weights_are_named() -> None:
    with pytest.raises(RevisionMismatchError, match="revision other"):
        route(record("a", 0, 10, revision="other"))


def test_spans_beyond_the_model_are_no_trouble() -> None:
    assert route(record("a", 0, 5), record("b", 5, 60000), record("c", 11, 12)) == [
        Hop(PeerId("a"), Span(0, 5), "n"),
        Hop(PeerId("b"), Span(5, 10), "n"),
    ]


def test_nodes_with_room_are_preferred_and_full_ones_are_asked_where_there_is_no_other() -> None:
    full, roomy = record("a", 0, 10, free_tokens=9), record("b", 0, 5)
    assert peers(route(full, roomy)) == "ba"
    assert len(route(full, roomy, needed_tokens=9)) == 1
    assert peers(route(full, roomy, record("c", 5, 10))) == "bc"


def test_a_peer_that_failed_is_used_only_where_nobody_else_is() -> None:
    records = [record("a", 0, 10), record("b", 0, 5), record("c", 4, 10)]
    assert peers(route(*records, avoided={"a"})) == "bc"
    assert peers(route(*records[:2], avoided={"a"})) == "ba"
    assert peers(route(records[0], record("d", 4, 5), avoided={"a"})) == "a"  # rather than twice


def test_equal_nodes_share_the_load() -> None:
    view = SwarmView([record(name, 0, 10) for name in "abcd"])
    assert {peers(find(view, seed=seed)) for seed in range(100)} == set("abcd")


def test_nodes_a_little_slower_share_the_load_and_others_do_not() -> None:
    view = SwarmView([record(name, 0, 10, block_step_s=s) for name, s in zip("abc", (0.1, 0.105, 0.12), strict=True)])
    assert {peers(find(view, seed=seed)) for seed in range(50)} == {"a", "b"}
    assert {peers(find(view, RouteWish(slack=0.0), seed=seed)) for seed in range(50)} == {"a"}


def test_chance_adds_no_hops() -> None:
    view = SwarmView([record(name, 0, 10, block_step_s=0.5) for name in "abcd"], away(a=0.0, b=0.0, c=0.0, d=0.0))
    assert {len(find(view, seed=seed)) for seed in range(50)} == {1}


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        ({"block_step_s": 0.03}, {"block_step_s": 0.02}),
        ({"block_step_s": None}, {"block_step_s": 0.01}),
        ({"block_step_s": 0.02, "queue_s": 0.1}, {"block_step_s": 0.025}),
    ],
    ids=["slower", "unmeasured", "queue"],
)
def test_what_nodes_say_decides(worse: dict[str, object], better: dict[str, object]) -> None:
    assert peers(route(record("a", 0, 10, **worse), record("b", 0, 10, **better))) == "b"


def test_pings_decide_and_an_unknown_one_counts_as_far() -> None:
    records = [record("a", 0, 10), record("b", 0, 10), record("c", 0, 10)]
    assert peers(find(SwarmView(records, away(a=0.3, b=0.05)))) == "b"
    assert peers(find(SwarmView(records, away(a=0.3, b=0.2)))) == "c"


def test_what_the_client_measured_outweighs_what_a_node_says() -> None:
    liar, honest = record("a", 0, 10, block_step_s=0.0), record("b", 0, 10, block_step_s=0.02)
    assert peers(find(SwarmView([liar, honest]))) == "a"
    assert peers(find(SwarmView([liar, honest], own={PeerId("a"): OwnSpeed(0.05, True)}))) == "b"
    assert peers(find(SwarmView([liar, honest], own={PeerId("a"): OwnSpeed(0.05, False)}))) == "b"
    slandered = dataclasses.replace(liar, block_step_s=1.0)
    assert peers(find(SwarmView([slandered, honest], own={PeerId("a"): OwnSpeed(0.01, True)}))) == "a"


def test_a_node_that_holds_the_prefix_is_preferred_for_a_long_prompt() -> None:
    view = SwarmView([record("a", 0, 10, block_step_s=0.01), record("b", 0, 10, block_step_s=0.02)])
    assert peers(find(view)) == "a"
    assert peers(find(view, RouteWish(affinity={PeerId("b"): 2000}))) == "b"
    assert peers(find(view, RouteWish(affinity={PeerId("b"): 64}))) == "a"


def test_on_a_ring_the_way_back_and_the_ways_between_count() -> None:
    near = [record("a", 0, 5, pings_s=(("c", 0.01),)), record("b", 5, 10), record("c", 5, 10)]
    view = SwarmView(near, away(a=0.1, b=0.06, c=0.1))
    assert peers(find(view, RouteWish(way=Way.RELAYED))) == "ab"
    assert peers(find(view, RouteWish(way=Way.RING))) == "ac"  # 50 + 5 + 50 ms against 50 + 80 + 30


def test_nodes_are_not_believed_nearer_than_their_distances_from_here_allow() -> None:
    records = [record("a", 0, 5, pings_s=(("c", 0.0),)), record("b", 5, 10), record("c", 5, 10)]
    view = SwarmView(records, away(a=0.01, b=0.15, c=0.2))
    assert peers(find(view, RouteWish(way=Way.RING))) == "ab"


def test_a_fast_node_in_the_middle_is_not_worth_a_second_visit() -> None:
    records = [record("a", 0, 10, block_step_s=1.0), record("b", 3, 6, block_step_s=0.01)]
    assert peers(route(*records)) == "a"
    assert peers(route(*records, record("c", 6, 10, block_step_s=2.0))) == "a"  # 10 s against 3 + 0.03 + 8
    assert peers(route(*records, record("c", 6, 10, block_step_s=1.5))) == "abc"


def test_a_route_through_a_part_of_the_blocks_looks_at_nothing_else() -> None:
    view = SwarmView([record("a", 0, 4), record("b", 3, 6), record("c", 5, 8), record("d", 0, 1)])  # nobody has 8 and 9
    hops = find(view, RouteWish(span=Span(2, 7), slack=0.0))
    assert peers(hops) == "abc"
    assert [block for hop in hops for block in range(hop.span.start, hop.span.end)] == list(range(2, 7))
    with pytest.raises(MissingBlocksError) as caught:
        find(view, RouteWish(span=Span(2, 9)))
    assert caught.value.missing == (Span(8, 10),)
    with pytest.raises(MissingBlocksError) as caught:
        find(SwarmView([record("a", 0, 4), record("b", 9, 10)]), RouteWish(span=Span(5, 7)))
    assert caught.value.missing == (Span(4, 9),)


# Compared with all routes there are.

spans = st.tuples(st.integers(0, 5), st.integers(1, 6)).map(lambda t: Span(t[0], min(6, t[0] + t[1])))
seconds = st.sampled_from([0.0, 0.004, 0.01, 0.05, 0.2])
nodes = st.tuples(spans, seconds, seconds, st.one_of(st.none(), seconds), st.dictionaries(st.integers(0, 4), seconds))


def swarm_of(drawn: Sequence[tuple[Span, float, float, float | None, dict[int, float]]]) -> SwarmView:
    records = [
        record(
            MODEL_NAMES[number],
            span.start,
            span.end,
            block_step_s=block_s,
            queue_s=queue_s,
            pings_s=tuple((MODEL_NAMES[other], ping_s) for other, ping_s in pings.items()),
        )
        for number, (span, block_s, queue_s, _, pings) in enumerate(drawn)
    ]
    return SwarmView(records, {PeerId(MODEL_NAMES[n]): d[3] for n, d in enumerate(drawn) if d[3] is not None})


def all_routes(records: Sequence[NodeRecord], num_blocks: int) -> list[list[tuple[NodeRecord, Span]]]:
    """Every route that visits no node twice."""
    holders = [[r for r in records if r.start_block <= block < r.end_block] for block in range(num_blocks)]
    routes = []
    for chosen in itertools.product(*holders):
        runs = [list(run) for _, run in itertools.groupby(range(num_blocks), key=lambda block: chosen[block].peer_id)]
        if len({chosen[run[0]].peer_id for run in runs}) == len(runs):
            routes.append([(chosen[run[0]], Span(run[0], run[-1] + 1)) for run in runs])
    return routes


@given(st.lists(nodes, min_size=1, max_size=5), st.sampled_from(Way), st.integers(0, 9))
@settings(max_examples=400, deadline=None)
def test_no_route_is_shorter(
    drawn: list[tuple[Span, float, float, float | None, dict[int, float]]], way: Way, seed: int
) -> None:
    view, model = swarm_of(drawn), ModelKey("m", "rev", 6)
    if uncovered((r.span for r in view.records), 6):
        with pytest.raises(MissingBlocksError):
            find(view, RouteWish(way=way), model)
        return
    by_peer = {r.peer_id: r for r in view.records}
    routes = all_routes(view.records, 6)
    for slack in (0.0, SLACK):
        wish = RouteWish(way=way, slack=slack)
        hops = find(view, wish, model, seed)
        assert [block for hop in hops for block in range(hop.span.start, hop.span.end)] == list(range(6))
        assert all(by_peer[hop.peer_id].span.contains(hop.span) for hop in hops)
        assert len({hop.peer_id for hop in hops}) == len(hops)
        costs = CostModel(view, wish)
        found_s = costs.route_s([(by_peer[hop.peer_id], hop.span) for hop in hops])
        assert found_s <= min(costs.route_s(route) for route in routes) * (1 + slack) + 1e-5


def test_costs_are_those_of_the_loop() -> None:
    a, b = record("a", 0, 4, block_step_s=0.01, queue_s=0.005), record("b", 4, 10, block_step_s=0.02)
    view = SwarmView([a, dataclasses.replace(b, pings_s=(("a", 0.05),))], away(a=0.04, b=0.06))
    path = [(a, Span(0, 4)), (view.records[1], Span(4, 10))]
    compute_s = HOP_S + 0.005 + 0.04 + HOP_S + 0.12
    assert CostModel(view, RouteWish()).route_s(path) == pytest.approx(compute_s + 0.04 + 0.06)
    assert CostModel(view, RouteWish(way=Way.RING)).route_s(path) == pytest.approx(compute_s + 0.02 + 0.025 + 0.03)
