"""Routes for training share the work among nodes by what they can do, so that the weakest block decides."""

import random
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm_client.routing.costs import RouteWish
from swarm_client.routing.find_route import Hop, ModelKey, find_throughput_route
from swarm_client.routing.swarm_view import SwarmView
from swarm_protocol.errors import MissingBlocksError
from swarm_protocol.ids import PeerId
from swarm_protocol.records import NodeRecord
from swarm_protocol.spans import Span, uncovered
from tests.client.test_find_route import MODEL, MODEL_NAMES, record


def routes(*records: NodeRecord, count: int = 1, wish: RouteWish | None = None) -> list[list[Hop]]:
    draw = random.Random(0).random
    return [find_throughput_route(SwarmView(records), MODEL, wish or RouteWish(), draw) for _ in range(count)]


def test_nodes_are_chosen_by_their_tokens_per_second() -> None:
    quick, slow = record("a", 0, 10, block_token_s=0.001), record("b", 0, 10, block_token_s=0.003)
    chosen = Counter(hops[0].peer_id for hops in routes(quick, slow, count=2000))
    assert chosen["a"] / 2000 == pytest.approx(0.75, abs=0.04)
    assert chosen["b"] / 2000 == pytest.approx(0.25, abs=0.04)


def test_a_route_stays_at_its_node_where_nobody_joins_or_leaves() -> None:
    records = [record("a", 0, 5), record("b", 0, 5), record("c", 5, 10), record("d", 5, 10)]
    assert {len(hops) for hops in routes(*records, count=100)} == {2}


def test_a_node_that_begins_within_a_span_takes_its_share_from_there() -> None:
    whole, half = record("a", 0, 10, block_token_s=0.001), record("b", 5, 10, block_token_s=0.002)  # equally quick
    found = Counter("".join(hop.peer_id for hop in hops) for hops in routes(whole, half, count=1000))
    assert set(found) == {"a", "ab"}
    assert found["ab"] / 1000 == pytest.approx(0.5, abs=0.05)


def test_no_node_is_asked_for_more_than_the_weakest_block_allows() -> None:
    rng = random.Random(3)
    records = [record(name, 0, 10, block_token_s=0.001) for name in "ab"]
    for name in "cdefgh":
        start = rng.randint(0, 7)
        records.append(
            record(name, start, min(10, start + rng.randint(2, 5)), block_token_s=rng.uniform(0.0003, 0.003))
        )
    token_s = {r.peer_id: r.block_token_s or 0.0 for r in records}
    rates = {r.peer_id: 1 / (token_s[r.peer_id] * len(r.span)) for r in records}
    weakest = min(sum(rates[r.peer_id] for r in records if r.start_block <= b < r.end_block) for b in range(10))
    busy_s: dict[str, float] = defaultdict(float)
    for hops in routes(*records, count=4000):
        for hop in hops:
            busy_s[hop.peer_id] += len(hop.span) * next(
                r.block_token_s or 0 for r in records if r.peer_id == hop.peer_id
            )
    assert 4000 / max(busy_s.values()) >= 0.93 * weakest


def test_nodes_that_failed_are_avoided_and_missing_blocks_named() -> None:
    records = [record("a", 0, 10), record("b", 0, 10)]
    wish = RouteWish(avoided={PeerId("a")})
    assert {hops[0].peer_id for hops in routes(*records, count=20, wish=wish)} == {"b"}
    with pytest.raises(MissingBlocksError):
        routes(record("a", 0, 9))


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6), st.floats(0, 60)), max_size=6),
    st.randoms(use_true_random=False),
)
@settings(deadline=None)
def test_every_route_is_gapless(drawn: list[tuple[int, int, float]], rng: random.Random) -> None:
    model = ModelKey("m", "rev", 6)
    records = [
        record(MODEL_NAMES[number], start, min(6, start + length), block_token_s=token_s)
        for number, (start, length, token_s) in enumerate(drawn)
    ]
    if uncovered((r.span for r in records), 6):
        return
    for _ in range(5):
        hops = find_throughput_route(SwarmView(records), model, RouteWish(), rng.random)
        assert [block for hop in hops for block in range(hop.span.start, hop.span.end)] == list(range(6))
        spans = {r.peer_id: Span(r.start_block, r.end_block) for r in records}
        assert all(spans[hop.peer_id].contains(hop.span) for hop in hops)
