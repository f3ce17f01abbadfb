"""Pure: when nodes take other blocks than they have, and in which order.

A move closes sessions and loads blocks, so it has to be worth it. What one node could gain alone is often little, since
others stand in its way; so every node plans for all, and all that see the same records find the same plan. It is kept
only if it ends with a block that nobody held before, or with a weakest block at least a quarter stronger. Then every
node remembers it until it is done or a node has come or gone, and takes its own move when its turn comes: replanning
after each move could turn nodes back. A plan never has a move that leaves a block without a node, not even for a while,
and never moves a node whose owner has fixed its span. `server_node.move_turns` says who moves where several may.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from server_node.placement import Holder, best_span, layout_of, within
from server_node.placement_search import MAX_EVALUATIONS, Layout, attainable, search
from swarm_protocol.spans import Span

MIN_GAIN = 1.25
"""What a plan has to make of the weakest block's tokens/s."""

_GIVEN_UP = 0.98
"""Share of what a plan reaches that it must still reach without a move for the move to be left out."""


@dataclass(frozen=True, slots=True)
class Move:
    """That node `peer_id` gives `old` up and takes `new`."""

    peer_id: str
    old: Span
    new: Span


@dataclass(frozen=True, slots=True)
class Plan:
    """Moves among `members`, in the order that keeps the weakest block strongest on the way."""

    num_blocks: int
    members: frozenset[str]
    moves: tuple[Move, ...]


def plan_moves(
    num_blocks: int, holders: Collection[Holder], min_gain: float = MIN_GAIN, max_evaluations: int = MAX_EVALUATIONS
) -> Plan | None:
    """Return the moves that are worth it, the same for all nodes that see `holders`; None if there are none.

    Takes up to half a second for small swarms and some seconds for a thousand nodes; at once if what is there is so
    good that no plan could be worth it.
    """
    nodes = _ordered(num_blocks, holders)
    if not nodes:
        return None
    before = layout_of(num_blocks, nodes)
    is_whole = bool(before.num_holders.all())
    needed = before.weakest * min_gain
    if is_whole and attainable(before.rates, before.most, num_blocks) < needed:
        return None
    movable = np.array([index for index, holder in enumerate(nodes) if not holder.is_fixed], dtype=np.int64)

    def reachable(wanted: Layout) -> Layout:
        return _after(before, nodes, _in_order(before, nodes, _moves_to(nodes, _spans(wanted))))

    targets = _spans(search(before, movable, max_evaluations, reachable))
    moves = _in_order(before, nodes, _without_idle_moves(before, nodes, _moves_to(nodes, targets)))
    reached = _after(before, nodes, moves)
    is_fuller = reached.quality[0] > before.quality[0]
    is_worth_it = bool(moves) and (is_fuller or (is_whole and reached.weakest >= needed))
    return Plan(num_blocks, frozenset(holder.peer_id for holder in nodes), moves) if is_worth_it else None


def next_moves(plan: Plan, holders: Collection[Holder]) -> tuple[Move, ...]:
    """Return which moves of `plan` may be made now: those that leave the weakest block strongest.

    Empty if the plan is done, or if nodes have come, gone or moved otherwise, so that it is to be made anew.
    """
    nodes = _ordered(plan.num_blocks, holders)
    if plan.members != frozenset(holder.peer_id for holder in nodes):
        return ()
    spans = {holder.peer_id: holder.span for holder in nodes}
    open_moves = [move for move in plan.moves if spans[move.peer_id] == move.old]
    return _best_next(layout_of(plan.num_blocks, nodes), nodes, open_moves)


def better_span(plan: Plan, peer_id: str, holders: Collection[Holder], on_disk: Collection[Span] = ()) -> Span | None:
    """Return the blocks that node `peer_id`, one of `holders`, should move to now, or None if it should stay.

    The plan is everybody's; where another window serves the swarm as well, it may align better, or be `on_disk`.
    """
    move = next((move for move in next_moves(plan, holders) if move.peer_id == peer_id), None)
    if move is None:
        return None
    nodes = _ordered(plan.num_blocks, holders)
    now, ended = layout_of(plan.num_blocks, nodes), _after(layout_of(plan.num_blocks, nodes), nodes, plan.moves)
    me = [holder.peer_id for holder in nodes].index(peer_id)
    others = [span for node, span in enumerate(_spans(ended)) if node != me]
    ended.take_out(me)
    chosen = best_span(ended, me, others, on_disk)
    return chosen if chosen != move.old and _may_leave(now, move.old, chosen) else move.new


def _ordered(num_blocks: int, holders: Collection[Holder]) -> list[Holder]:
    return sorted(within(holders, num_blocks), key=lambda holder: holder.peer_id)


def _spans(layout: Layout) -> list[Span]:
    pairs = zip(layout.starts.tolist(), layout.lengths.tolist(), strict=True)
    return [Span(start, start + length) for start, length in pairs]


def _after(layout: Layout, nodes: Sequence[Holder], moves: Sequence[Move]) -> Layout:
    """Return `layout` with all `moves` made."""
    result, index_of = layout.copy(), {holder.peer_id: index for index, holder in enumerate(nodes)}
    for move in moves:
        _make(result, index_of[move.peer_id], move.new)
    return result


def _make(layout: Layout, node: int, span: Span) -> None:
    layout.take_out(node)
    layout.put_in(node, span.start, len(span))


def _moves_to(nodes: Sequence[Holder], targets: Sequence[Span]) -> list[Move]:
    pairs = zip(nodes, targets, strict=True)
    return [Move(holder.peer_id, holder.span, target) for holder, target in pairs if holder.span != target]


def _without_idle_moves(before: Layout, nodes: Sequence[Holder], moves: Sequence[Move]) -> list[Move]:
    """Return `moves` without those that hardly matter for where the swarm ends."""
    index_of = {holder.peer_id: index for index, holder in enumerate(nodes)}
    ended = _after(before, nodes, moves)
    num_held, weakest = ended.quality
    needed = num_held, weakest * _GIVEN_UP
    kept = []
    for move in moves:
        _make(ended, index_of[move.peer_id], move.old)
        if ended.quality < needed:
            _make(ended, index_of[move.peer_id], move.new)
            kept.append(move)
    return kept


def _in_order(before: Layout, nodes: Sequence[Holder], moves: list[Move]) -> tuple[Move, ...]:
    """Return `moves` one after the other, as far as they can be made without leaving a block without a node."""
    layout, index_of = before.copy(), {holder.peer_id: index for index, holder in enumerate(nodes)}
    ordered: list[Move] = []
    while left := [move for move in moves if move not in ordered]:
        possible = _best_next(layout, nodes, left)
        if not possible:
            break
        ordered.append(possible[0])
        _make(layout, index_of[possible[0].peer_id], possible[0].new)
    return tuple(ordered)


def _best_next(layout: Layout, nodes: Sequence[Holder], moves: Sequence[Move]) -> tuple[Move, ...]:
    """Return those of `moves` that uncover nothing and leave the swarm best; several if they are equal."""
    index_of = {holder.peer_id: index for index, holder in enumerate(nodes)}
    quality_of: dict[Move, tuple[int, float]] = {}
    for move in moves:
        if _may_leave(layout, move.old, move.new):
            _make(layout, index_of[move.peer_id], move.new)
            quality_of[move] = layout.quality
            _make(layout, index_of[move.peer_id], move.old)
    if not quality_of:
        return ()
    num_held, weakest = max(quality_of.values())
    # What rounding leaves of equal sums is no difference.
    return tuple(move for move, found in quality_of.items() if found >= (num_held, weakest * (1 - 1e-9)))


def _may_leave(layout: Layout, old: Span, new: Span) -> bool:
    """Whether every block of `old` that is not in `new` has another node."""
    left = [block for block in range(old.start, old.end) if not new.start <= block < new.end]
    return all(layout.num_holders[block] > 1 for block in left)
