"""Pure: which blocks a node takes when it joins.

Every node decides for itself, from the records in the directory, and those that see the same records find the same. The
rule looks at what each block gets (`server_node.placement_search`), then at boundaries that align with those of others
and at long spans, so that routes have fewer hops, then at what is on disk already; among equals the first window wins.
A node may hold fewer blocks than it has memory for: its speed is shared out over them, and a weak block may need more.
`server_node.placement_plan` says when a node moves to other blocks.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from server_node.placement_search import (
    JOIN_SHARPNESS,
    Layout,
    equally_good,
    window_gains,
)
from swarm_protocol.spans import Span

USUAL_STEP_S = 0.01
"""Seconds per block of a decode step where no node says anything: a laptop's core on a small model."""

_FASTEST_STEP_S = 1e-5
"""A record may name any speed; beyond a GPU's nobody gets a block to himself for it."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A node and its blocks. `block_step_s` is None where nothing was measured: it counts as the others' median.

    `max_blocks` is what it has memory for, None where it is not known: then as many as it holds. A node whose owner has
    fixed the span, or only the number of blocks, keeps it.
    """

    peer_id: str
    span: Span
    block_step_s: float | None = None
    max_blocks: int | None = None
    is_fixed: bool = False
    is_length_fixed: bool = False


@dataclass(frozen=True, slots=True)
class Joiner:
    """A node that has no blocks yet: between `min_blocks` and `max_blocks` are wanted; `on_disk` needs no download."""

    max_blocks: int
    min_blocks: int = 1
    block_step_s: float | None = None
    on_disk: tuple[Span, ...] = ()


def choose_span(num_blocks: int, joiner: Joiner, others: Collection[Holder]) -> Span:
    """Return the blocks of a model of `num_blocks` that `joiner` serves best beside `others`.

    Fewer than `min_blocks` are taken only if the model has fewer. Raises ValueError if none is wanted.
    """
    if not 1 <= joiner.min_blocks <= joiner.max_blocks:
        raise ValueError(f"at least one block is needed, not {joiner.min_blocks} to {joiner.max_blocks}")
    most = min(num_blocks, joiner.max_blocks)
    me = Holder("", Span(0, most), joiner.block_step_s)
    layout = layout_of(num_blocks, [*within(others, num_blocks), me])
    node = len(layout.rates) - 1
    layout.least[node] = min(joiner.min_blocks, most)
    layout.take_out(node)
    return best_span(layout, node, [holder.span for holder in others], joiner.on_disk)


def within(holders: Iterable[Holder], num_blocks: int) -> list[Holder]:
    """Return those whose spans are of this model; a record is a stranger's word."""
    return [holder for holder in holders if holder.span.end <= num_blocks]


def layout_of(num_blocks: int, holders: Sequence[Holder]) -> Layout:
    """Return the layout of nodes that are `within` the model, in their order."""
    known_s = [holder.block_step_s for holder in holders if holder.block_step_s]
    usual_s = median(known_s) if known_s else USUAL_STEP_S
    steps_s = np.array([max(_FASTEST_STEP_S, holder.block_step_s or usual_s) for holder in holders])
    lengths = np.array([len(holder.span) for holder in holders], dtype=np.int64)
    fits = np.array([holder.max_blocks or 0 for holder in holders], dtype=np.int64)
    is_kept = np.array([holder.is_fixed or holder.is_length_fixed for holder in holders])
    return Layout.of(
        num_blocks,
        1 / steps_s,
        np.where(is_kept, lengths, 1),
        np.where(is_kept, lengths, np.clip(fits, lengths, num_blocks)),
        np.array([holder.span.start for holder in holders], dtype=np.int64),
        lengths,
    )


def best_span(layout: Layout, node: int, others: Sequence[Span], on_disk: Collection[Span]) -> Span:
    """Return the best window for `node`, which is not in `layout` at present.

    `others` are the spans whose ends are good to share, `on_disk` those that need no download.
    """
    least, most = int(layout.least[node]), int(layout.most[node])
    gains = window_gains(layout, float(layout.rates[node]), least, most, JOIN_SHARPNESS)
    edges = {0, layout.num_blocks} | {span.start for span in others} | {span.end for span in others}
    kept = {block for span in on_disk for block in range(span.start, span.end)}

    def preference(span: Span) -> tuple[int, int, int, int]:
        num_aligned = (span.start in edges) + (span.end in edges)
        return num_aligned, len(span), len(kept & set(range(span.start, span.end))), -span.start

    equals = np.argwhere(equally_good(layout, gains, JOIN_SHARPNESS)).tolist()
    return max((Span(start, start + least + row) for row, start in equals), key=preference)
