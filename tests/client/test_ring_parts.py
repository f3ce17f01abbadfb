"""Segments of a ring, and ways between nodes that do not work."""

import pytest

from swarm_client.leg import direct_segments
from swarm_client.routing.link_health import RETRY_S, LinkHealth
from swarm_protocol.ids import PeerId
from swarm_protocol.messages import MAX_ONWARD


@pytest.mark.parametrize(
    ("is_direct", "wanted"),
    [
        ([], [range(1)]),
        ([True, True], [range(3)]),
        ([False, False], [range(1), range(1, 2), range(2, 3)]),
        ([True, False, True, True], [range(2), range(2, 5)]),
        ([False, True], [range(1), range(1, 3)]),
        ([True] * (MAX_ONWARD + 1), [range(MAX_ONWARD + 1), range(MAX_ONWARD + 1, MAX_ONWARD + 2)]),
    ],
)
def test_segments_end_where_a_node_does_not_reach_the_next(is_direct: list[bool], wanted: list[range]) -> None:
    assert direct_segments(is_direct) == wanted


def test_a_way_that_failed_is_tried_again_after_a_while() -> None:
    links, a, b = LinkHealth(), PeerId("a"), PeerId("b")
    assert links.works(a, b, 0.0)
    links.failed(a, b, 10.0)
    assert not links.works(a, b, 10.0 + RETRY_S / 2)
    assert links.works(b, a, 10.0)
    assert links.works(a, b, 10.0 + RETRY_S)
    links.failed(b, a, 10.0 + 2 * RETRY_S)
    assert links.works(a, b, 10.0 + 2 * RETRY_S)
