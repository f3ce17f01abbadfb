"""Which blocks a node takes, and how many."""

import pytest

from server_node.placement import choose_span, num_blocks_that_fit
from swarm_protocol.spans import Span


@pytest.mark.parametrize(
    ("num_blocks", "wanted", "held", "expected"),
    [
        (30, 15, [], Span(0, 15)),
        (30, 15, [Span(0, 15)], Span(15, 30)),
        (30, 20, [Span(0, 15)], Span(10, 30)),
        (30, 10, [Span(0, 12), Span(20, 30)], Span(10, 20)),
        (30, 15, [Span(0, 15), Span(15, 30)], Span(0, 15)),
        (30, 15, [Span(0, 15), Span(15, 30), Span(0, 15)], Span(15, 30)),
        (5, 99, [Span(0, 2)], Span(0, 5)),
        (8, 2, [Span(0, 3), Span(0, 8), Span(5, 8)], Span(3, 5)),
        (4, 2, [Span(0, 9)], Span(0, 2)),
    ],
)
def test_the_least_held_blocks_are_chosen(num_blocks: int, wanted: int, held: list[Span], expected: Span):
    assert choose_span(num_blocks, wanted, held) == expected


def test_no_blocks_are_no_span():
    with pytest.raises(ValueError, match="at least one"):
        choose_span(30, 0, [])


@pytest.mark.parametrize(("free", "expected"), [(0, 0), (149, 0), (150, 1), (300, 2), (10**9, 7)])
def test_blocks_that_fit_leave_room_for_the_cache(free: int, expected: int):
    assert num_blocks_that_fit(free, 100, 7) == expected
