"""Routes cover all blocks with the fewest nodes, and what is missing is named."""

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_client.routing.find_route import Hop, ModelKey, find_route
from swarm_protocol.errors import MissingBlocksError, RevisionMismatchError
from swarm_protocol.ids import PeerId
from swarm_protocol.records import NodeRecord
from swarm_protocol.spans import Span, uncovered

MODEL = ModelKey("m", "rev", 10)


def record(name: str, start: int, end: int, **fields: object) -> NodeRecord:
    plain = NodeRecord(
        name, "m", "rev", start, end, "online", 1, 0.0, 30.0, (1,), "umbel", "float32", "n", 1000, 1000, ""
    )
    return dataclasses.replace(plain, **fields)  # type: ignore[arg-type]


def route(*records: NodeRecord, needed_tokens: int = 10, avoided: set[str] | None = None) -> list[Hop]:
    return find_route(
        records,
        MODEL,
        needed_tokens=needed_tokens,
        avoided={PeerId(name) for name in avoided or set()},
        choose=random.Random(0).choice,
    )


def test_one_node_with_all_blocks_is_a_route() -> None:
    assert route(record("a", 0, 10), record("b", 0, 5)) == [Hop(PeerId("a"), Span(0, 10), "n")]


def test_overlapping_spans_are_cut_where_the_one_before_ends() -> None:
    assert route(record("b", 3, 10), record("a", 0, 6)) == [
        Hop(PeerId("a"), Span(0, 6), "n"),
        Hop(PeerId("b"), Span(6, 10), "n"),
    ]


@pytest.mark.parametrize(
    "other",
    [{"state": "joining"}, {"state": "draining"}, {"state": "offline"}, {"model": "another"}],
    ids=["joining", "draining", "offline", "another model"],
)
def test_nodes_that_do_not_serve_are_not_chosen(other: dict[str, object]) -> None:
    with pytest.raises(MissingBlocksError) as caught:
        route(record("a", 0, 4), record("b", 3, 10, **other), record("c", 6, 8))
    assert caught.value.missing == (Span(4, 6), Span(8, 10))


def test_other_weights_are_named() -> None:
    with pytest.raises(RevisionMismatchError, match="revision other"):
        route(record("a", 0, 10, revision="other"))


def test_nodes_with_room_are_preferred_and_full_ones_are_asked_where_there_is_no_other() -> None:
    full, roomy = record("a", 0, 10, free_tokens=9), record("b", 0, 5)
    assert [hop.peer_id for hop in route(full, roomy)] == ["b", "a"]
    assert len(route(full, roomy, needed_tokens=9)) == 1
    assert [hop.peer_id for hop in route(full, roomy, record("c", 5, 10))] == ["b", "c"]


def test_a_peer_that_failed_is_used_only_where_nobody_else_is() -> None:
    records = [record("a", 0, 10), record("b", 0, 5), record("c", 4, 10)]
    assert [hop.peer_id for hop in route(*records, avoided={"a"})] == ["b", "c"]
    assert [hop.peer_id for hop in route(*records[:2], avoided={"a"})] == ["b", "a"]


def test_equal_nodes_share_the_load() -> None:
    records = [record(name, 0, 10) for name in "abcd"]
    rng = random.Random(1)
    chosen = {find_route(records, MODEL, needed_tokens=1, avoided=(), choose=rng.choice)[0].peer_id for _ in range(100)}
    assert chosen == set("abcd")


spans = st.tuples(st.integers(0, 9), st.integers(1, 10)).map(lambda t: Span(t[0], min(10, t[0] + t[1])))


@given(st.lists(spans, max_size=8), st.randoms(use_true_random=False))
def test_a_route_is_gapless_and_shortest(held: list[Span], rng: random.Random) -> None:
    records = [record(f"p{i}", span.start, span.end) for i, span in enumerate(held)]
    if uncovered(held, 10):
        with pytest.raises(MissingBlocksError):
            find_route(records, MODEL, needed_tokens=0, avoided=(), choose=rng.choice)
        return
    hops = find_route(records, MODEL, needed_tokens=0, avoided=(), choose=rng.choice)
    assert [block for hop in hops for block in range(hop.span.start, hop.span.end)] == list(range(10))
    assert all(held[int(hop.peer_id[1:])].contains(hop.span) for hop in hops)
    fewest = [0] + [99] * 10
    for end in range(1, 11):
        fewest[end] = min((fewest[s] + 1 for s in range(end) for h in held if h.contains(Span(s, end))), default=99)
    assert len(hops) == fewest[10]


def test_a_route_through_a_part_of_the_blocks_looks_at_nothing_else() -> None:
    nodes = [record("a", 0, 4), record("b", 3, 6), record("c", 5, 8)]  # nobody has 8 and 9
    found = find_route(nodes, MODEL, needed_tokens=10, avoided=set(), choose=random.Random(0).choice, span=Span(2, 7))
    assert found == [
        Hop(PeerId("a"), Span(2, 4), "n"),
        Hop(PeerId("b"), Span(4, 6), "n"),
        Hop(PeerId("c"), Span(6, 7), "n"),
    ]
    with pytest.raises(MissingBlocksError) as caught:
        find_route(nodes, MODEL, needed_tokens=10, avoided=set(), choose=random.Random(0).choice, span=Span(2, 9))
    assert caught.value.missing == (Span(8, 10),)
