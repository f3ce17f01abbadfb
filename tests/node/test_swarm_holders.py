"""What records say about where blocks lie."""

import pytest

from server_node.placement import Holder
from server_node.swarm_holders import holders_among, stays_online
from swarm_protocol.records import NodeRecord
from swarm_protocol.spans import Span


def record(peer_id: str, start: int, end: int, state: str = "online", **facts: object) -> NodeRecord:
    values = {"incarnation": 1, "published_s": 0.0, "expires_at_s": 30.0, "revision": "r", **facts}
    return NodeRecord(
        peer_id=peer_id, model="m", start_block=start, end_block=end, state=state, versions=(1,), software="s",
        dtype="float32", numerics="n", free_tokens=0, max_tokens=0, **values,
    )  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, Holder("a", Span(0, 3), None, None, is_fixed=True)),
        ({"state": "joining", "placed": "freely", "max_blocks": 9}, Holder("a", Span(0, 3), None, 9)),
        ({"placed": "by_length"}, Holder("a", Span(0, 3), is_length_fixed=True)),
        ({"state": "draining"}, None),
        ({"state": "draining", "next_blocks": (4, 6)}, Holder("a", Span(4, 6), is_fixed=True)),
        ({"state": "offline", "next_blocks": (4, 6)}, None),
    ],
)
def test_holders_are_those_that_serve_or_are_about_to(facts: dict[str, object], expected: Holder | None):
    assert holders_among([record("a", 0, 3, **facts)]) == ([] if expected is None else [expected])  # type: ignore[arg-type]


def test_speeds_that_hardly_differ_count_as_equal():
    first, second, other = (
        holders_among([record("a", 0, 3, block_step_s=step_s)])[0].block_step_s for step_s in (0.0100, 0.0101, 0.02)
    )
    assert first == second
    assert first is not None
    assert other is not None
    assert 1.4 < other / first < 2.6
    assert holders_among([record("a", 0, 3, block_step_s=0.0)])[0].block_step_s == 0.0


@pytest.mark.parametrize(
    ("new", "others", "expected"),
    [
        (Span(4, 7), [record("a", 0, 3)], True),
        (Span(4, 7), [record("a", 0, 3, state="joining")], False),
        (Span(4, 7), [record("a", 0, 2)], False),
        (Span(4, 7), [record("a", 0, 1), record("b", 1, 9)], True),
        (Span(2, 5), [record("a", 0, 2)], True),
        (Span(0, 4), [], True),
        (Span(1, 4), [], False),
        (Span(4, 7), [record("a", 0, 3, state="draining")], False),
    ],
)
def test_blocks_are_left_only_to_nodes_that_serve_them_now(new: Span, others: list[NodeRecord], expected: bool):
    assert stays_online(Span(0, 3), new, others) is expected


def test_next_blocks_have_to_be_some():
    with pytest.raises(ValueError, match="non-empty"):
        record("a", 0, 3, next_blocks=(4, 4))
