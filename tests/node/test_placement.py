"""Which blocks a node takes and how many, and when it moves to others."""

import random
from dataclasses import replace
from itertools import pairwise
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server_node.move_turns import (
    CLAIM_BY_S,
    DWELL_S,
    JITTER_S,
    LOOK_SPREAD_S,
    READ_AT_S,
    ROUND_S,
    ROUNDS_FOR_SPEED,
    may_claim,
    may_look,
    may_look_at_s,
    next_look_s,
    round_of,
    winner,
)
from server_node.placement import Holder, Joiner, choose_span
from server_node.placement_plan import MIN_GAIN, Move, Plan, better_span, next_moves, plan_moves
from swarm_protocol.move_claims import MoveClaim
from swarm_protocol.spans import Span, uncovered


def holders(*spans: Span, **facts: object) -> list[Holder]:
    return [Holder(f"peer{index:02}", span, **facts) for index, span in enumerate(spans)]  # type: ignore[arg-type]


def tokens_per_s(num_blocks: int, swarm: list[Holder]) -> list[float]:
    """What each block gets, counted plainly."""
    known_s = [holder.block_step_s for holder in swarm if holder.block_step_s]
    usual_s = median(known_s) if known_s else 1.0
    steps_s = [max(1e-5, holder.block_step_s or usual_s) for holder in swarm]
    return [
        sum(1 / s / len(h.span) for h, s in zip(swarm, steps_s, strict=True) if h.span.start <= block < h.span.end)
        for block in range(num_blocks)
    ]


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
def test_a_node_that_holds_a_fixed_number_takes_the_weakest_blocks(
    num_blocks: int, wanted: int, held: list[Span], expected: Span
):
    assert choose_span(num_blocks, Joiner(wanted, min_blocks=wanted), holders(*held)) == expected


@pytest.mark.parametrize(
    ("most", "held", "expected"),
    [
        pytest.param(30, [], Span(0, 30), id="an empty swarm gets all that fits"),
        pytest.param(12, [Span(0, 20)] * 20 + [Span(22, 30)] * 8, Span(20, 22), id="a small hole gets all of the node"),
        pytest.param(30, [Span(0, 15), Span(15, 30)], Span(0, 30), id="no block is weaker than another"),
        pytest.param(30, [Span(0, 5), Span(5, 30)], Span(5, 30), id="the blocks of an overloaded node"),
    ],
)
def test_a_node_may_take_fewer_blocks_than_fit(most: int, held: list[Span], expected: Span):
    assert choose_span(30, Joiner(most), holders(*held)) == expected


def test_the_speed_of_a_node_counts_not_only_that_it_is_there():
    slow, fast = Holder("a", Span(0, 5), 0.1), Holder("b", Span(5, 10), 0.001)
    assert choose_span(10, Joiner(5, 5, 0.01), [slow, fast]) == Span(0, 5)


def test_a_node_of_unknown_speed_counts_as_usual_and_an_impossible_speed_as_a_fast_one():
    known = [Holder("a", Span(0, 5), 0.002), Holder("b", Span(5, 10), None)]
    assert choose_span(10, Joiner(5, 5), known) == Span(0, 5)
    boaster = [Holder("a", Span(0, 5), 1e-300), Holder("b", Span(5, 10), 0.1)]
    assert choose_span(10, Joiner(5, 5, 0.1), boaster) == Span(5, 10)


def test_among_equals_boundaries_align_then_disks_count_then_the_first_wins():
    aligned = holders(Span(0, 8), Span(2, 4))
    assert choose_span(8, Joiner(1, 1), holders(Span(0, 8))) == Span(0, 1)
    assert choose_span(8, Joiner(1, 1, on_disk=(Span(7, 8),)), holders(Span(0, 8))) == Span(7, 8)
    assert choose_span(8, Joiner(1, 1, on_disk=(Span(3, 4),)), aligned) == Span(0, 1)


@pytest.mark.parametrize(("least", "most"), [(0, 0), (0, 3), (4, 3)])
def test_no_blocks_are_no_span(least: int, most: int):
    with pytest.raises(ValueError, match="at least one"):
        choose_span(30, Joiner(most, least), [])


def moves_of(num_blocks: int, swarm: list[Holder], min_gain: float = MIN_GAIN) -> tuple[Move, ...]:
    plan = plan_moves(num_blocks, swarm, min_gain)
    return () if plan is None else plan.moves


def moved(swarm: list[Holder], move: Move) -> list[Holder]:
    return [replace(holder, span=move.new) if holder.peer_id == move.peer_id else holder for holder in swarm]


def test_a_node_moves_where_the_weakest_block_gains_a_quarter():
    swarm = holders(Span(0, 4), Span(4, 8), Span(0, 4), Span(0, 4), max_blocks=4)
    plan = plan_moves(8, swarm)
    assert plan is not None
    (move,) = plan.moves
    assert move.peer_id != "peer01"
    assert (move.old, move.new) == (Span(0, 4), Span(4, 8))
    assert next_moves(plan, swarm) == (move,)
    assert better_span(plan, move.peer_id, swarm) == Span(4, 8)
    assert better_span(plan, "peer01", swarm) is None


def test_a_gain_of_less_than_a_quarter_moves_nobody():
    swarm = holders(*[Span(0, 4)] * 8, *[Span(4, 8)] * 6, max_blocks=4)
    assert not moves_of(8, swarm)
    assert moves_of(8, swarm, min_gain=7 / 6)
    assert moves_of(8, swarm[:-2])


def test_a_node_that_alone_holds_a_block_stays():
    swarm = [Holder("alone", Span(0, 4), 0.001), Holder("b", Span(4, 8), 0.1), Holder("c", Span(4, 8), 0.1)]
    assert "alone" not in {move.peer_id for move in moves_of(8, swarm)}


def test_a_node_whose_span_is_fixed_stays_and_one_whose_number_is_fixed_keeps_it():
    spans = (Span(0, 4), Span(0, 4), Span(0, 4), Span(4, 8))
    assert not moves_of(8, holders(*spans, max_blocks=8, is_fixed=True))
    kept = moves_of(8, holders(*spans, max_blocks=8, is_length_fixed=True))
    assert kept
    assert {len(move.new) for move in kept} == {4}


def test_a_block_without_a_node_is_filled_whatever_the_gain():
    (move,) = moves_of(8, holders(Span(0, 4), Span(0, 4), max_blocks=4))
    assert move.new == Span(4, 8)


def test_a_plan_ends_when_a_node_comes_or_goes():
    swarm = holders(Span(0, 4), Span(4, 8), Span(0, 4), Span(0, 4), max_blocks=4)
    plan = plan_moves(8, swarm)
    assert plan is not None
    assert not next_moves(plan, swarm[1:])
    assert not next_moves(plan, [*swarm, Holder("new", Span(4, 8))])
    assert not next_moves(plan, moved(swarm, plan.moves[0]))


def test_a_planned_move_that_has_become_unsafe_is_not_made():
    swarm = holders(Span(0, 4), Span(0, 4), Span(4, 8))
    plan = Plan(8, frozenset(holder.peer_id for holder in swarm), (Move("peer02", Span(4, 8), Span(0, 4)),))
    assert not next_moves(plan, swarm)
    assert better_span(plan, "peer02", swarm) is None


def test_a_move_that_serves_as_well_prefers_what_is_on_disk():
    swarm = holders(Span(0, 4), Span(5, 6), Span(7, 8), is_fixed=True)
    swarm.append(Holder("mover", Span(0, 1), is_length_fixed=True))
    plan = plan_moves(8, swarm)
    assert plan is not None
    assert better_span(plan, "mover", swarm) == Span(4, 5)
    assert better_span(plan, "mover", swarm, [Span(6, 7)]) == Span(6, 7)


@st.composite
def swarms(draw: st.DrawFn) -> tuple[int, list[Holder]]:
    num_blocks = draw(st.integers(1, 12))
    found = []
    for index in range(draw(st.integers(1, 7))):
        start = draw(st.integers(0, num_blocks - 1))
        span = Span(start, draw(st.integers(start + 1, num_blocks)))
        found.append(
            Holder(
                f"peer{index}",
                span,
                draw(st.sampled_from([None, 0.0, 1e-9, 0.001, 0.004, 0.02, 60.0])),
                draw(st.sampled_from([None, len(span), num_blocks, 999])),
                draw(st.booleans()),
                draw(st.booleans()),
            )
        )
    return num_blocks, found


def missing(num_blocks: int, swarm: list[Holder]) -> set[int]:
    holes = uncovered([holder.span for holder in swarm], num_blocks)
    return {block for hole in holes for block in range(hole.start, hole.end)}


@settings(deadline=None, max_examples=40)
@given(swarms(), st.randoms(use_true_random=False))
def test_plans_uncover_nothing_move_nobody_fixed_and_are_the_same_for_all(
    swarm: tuple[int, list[Holder]], rng: random.Random
):
    num_blocks, found = swarm
    plan = plan_moves(num_blocks, found, max_evaluations=100)
    assert plan_moves(num_blocks, rng.sample(found, len(found)), max_evaluations=100) == plan
    if plan is None:
        return
    before, holes, num_left = min(tokens_per_s(num_blocks, found)), missing(num_blocks, found), len(plan.moves)
    gaps = len(holes)
    while moves := next_moves(plan, found):
        move = rng.choice(moves)
        old = next(holder for holder in found if holder.peer_id == move.peer_id)
        assert not old.is_fixed
        assert move.new.end <= num_blocks
        assert len(move.new) <= max(len(old.span), old.max_blocks or 0)
        assert len(move.new) == len(old.span) or not old.is_length_fixed
        found, num_left = moved(found, move), num_left - 1
        assert missing(num_blocks, found) <= holes
        holes = missing(num_blocks, found)
    if not num_left:
        assert len(holes) < gaps or min(tokens_per_s(num_blocks, found)) >= MIN_GAIN * before * (1 - 1e-9)


@settings(deadline=None, max_examples=40)
@given(swarms(), st.integers(1, 12), st.booleans(), st.randoms(use_true_random=False))
def test_a_joining_node_gets_a_span_that_fits_and_all_see_the_same(
    swarm: tuple[int, list[Holder]], most: int, is_exact: bool, rng: random.Random
):
    num_blocks, found = swarm
    joiner = Joiner(most, min_blocks=most if is_exact else 1)
    span = choose_span(num_blocks, joiner, found)
    assert span.end <= num_blocks
    assert len(span) == min(most, num_blocks) if is_exact else len(span) <= most
    assert choose_span(num_blocks, joiner, rng.sample(found, len(found))) == span


def joined_swarm(rng: random.Random, num_nodes: int, num_blocks: int) -> list[Holder]:
    swarm: list[Holder] = []
    for index in range(num_nodes):
        step_s, most = 0.01 * rng.lognormvariate(0, 0.7), rng.randint(num_blocks // 8, num_blocks // 2)
        span = choose_span(num_blocks, Joiner(most, 1, step_s), swarm)
        swarm.append(Holder(f"peer{index:02}", span, step_s, most))
    return swarm


def test_a_small_swarm_settles_near_its_best_and_then_rests():
    """Ten nodes of all speeds join 24 blocks and take turns at the moves that all of them plan."""
    num_planned = 0
    for seed in range(6):
        swarm = joined_swarm(random.Random(seed), 10, 24)
        plan = plan_moves(24, swarm)
        if plan is not None:
            num_planned += 1
            for number in range(len(plan.moves)):
                claims = [claim_of(move, number) for move in next_moves(plan, swarm)]
                turn = winner(claims, number)
                assert turn is not None
                swarm = moved(swarm, next(move for move in plan.moves if move.peer_id == turn.peer_id))
                assert min(tokens_per_s(24, swarm)) > 0
            assert not next_moves(plan, swarm)
        assert plan_moves(24, swarm) is None
        assert min(tokens_per_s(24, swarm)) >= 0.7 * sum(1 / h.block_step_s for h in swarm if h.block_step_s) / 24
    assert num_planned


def claim_of(move: Move, round_number: int) -> MoveClaim:
    return MoveClaim(move.peer_id, move.new.start, move.new.end, round_number)


def test_a_node_looks_once_a_round_and_in_time_to_claim():
    for index in range(50):
        peer_id, now_s = f"peer{index}", 10 * ROUND_S
        look_s = next_look_s(peer_id, now_s)
        assert now_s <= look_s <= now_s + LOOK_SPREAD_S
        assert next_look_s(peer_id, look_s) == look_s
        assert next_look_s(peer_id, look_s + 0.001) == look_s + ROUND_S
        assert may_claim(round_of(look_s), look_s)
    assert may_claim(10, 10 * ROUND_S + CLAIM_BY_S - 1)
    assert not may_claim(10, 10 * ROUND_S + CLAIM_BY_S)
    assert LOOK_SPREAD_S < CLAIM_BY_S < READ_AT_S < ROUND_S


def test_a_node_stays_where_it_is_for_a_while_but_not_beside_a_hole():
    looks = [may_look_at_s(1000, f"peer{index}") for index in range(50)]
    assert all(1000 + DWELL_S <= look <= 1000 + DWELL_S + JITTER_S for look in looks)
    assert max(looks) - min(looks) > JITTER_S / 2
    rounds_s = [number * ROUND_S for number in range(200)]
    for_speed = [now_s for now_s in rounds_s if may_look(1000, "a", now_s, is_a_block_missing=False)]
    assert DWELL_S <= for_speed[0] - 1000 <= DWELL_S + JITTER_S + ROUNDS_FOR_SPEED * ROUND_S
    assert {later - earlier for earlier, later in pairwise(for_speed)} == {ROUNDS_FOR_SPEED * ROUND_S}
    assert all(may_look(1000, "a", now_s, is_a_block_missing=True) for now_s in rounds_s)


def test_one_claim_of_a_round_wins_whatever_their_order_and_not_always_the_same_peers():
    winners = set()
    for number in range(40):
        claims = [MoveClaim(f"peer{index}", 0, 4, number) for index in range(5)]
        won = winner(claims, number)
        assert won == winner(claims[::-1], number)
        assert won is not None
        winners.add(won.peer_id)
        assert winner(claims, number + 1) is None
    assert len(winners) == 5
    assert winner([], 0) is None
