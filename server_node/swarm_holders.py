"""Pure: what the records of a model's nodes say about where blocks lie, for the node that decides on its own."""

import math
from collections.abc import Iterable

from server_node.placement import Holder
from swarm_protocol.records import NodeRecord
from swarm_protocol.spans import Span, uncovered

_STEP = 1.25
"""Speeds are taken on a grid of this ratio: nodes that read records some seconds apart should find the same plan."""


def holders_among(records: Iterable[NodeRecord]) -> list[Holder]:
    """Return who holds what, or is about to, as placement reckons with it. Each node has one of `records`."""
    return [
        Holder(
            record.peer_id,
            span,
            _on_grid(record.block_step_s),
            record.max_blocks,
            is_fixed=record.placed == "by_owner",
            is_length_fixed=record.placed == "by_length",
        )
        for record in records
        if (span := record.planned_span) is not None
    ]


def stays_online(old: Span, new: Span, others: Iterable[NodeRecord]) -> bool:
    """Whether every block that a node gives up by moving from `old` to `new` is served by one of `others` now."""
    served = [record.span for record in others if record.state == "online"]
    missing = {block for hole in uncovered(served, old.end) for block in range(hole.start, hole.end)}
    return all(new.start <= block < new.end for block in missing if block >= old.start)


def _on_grid(step_s: float | None) -> float | None:
    return step_s and float(_STEP ** round(math.log(step_s, _STEP)))
