"""Which rows run through the head together, and whom they are held for."""

import pytest

from swarm_client.generation.ends_batches import HOLD_SHARE, MAX_HOLD_S, MAX_ROWS, EndsBatches, Row

BATCH_S = 0.008


def row(session: int, arrived_s: float = 1.0, model: str = "a") -> Row:
    return Row(session, model, arrived_s)


def held_s(left_s: dict[int, float], waiting: list[Row], batch_s: float = BATCH_S) -> float:
    """How long after the first row's arrival the rows are held, if sessions got their last tokens at these times."""
    batches = EndsBatches()
    for session, at_s in left_s.items():
        batches.ran([session], batch_s, at_s)
    return batches.hold_until_s(waiting) - waiting[0].arrived_s


@pytest.mark.parametrize(
    ("waiting", "wanted"),
    [
        ([row(1)], (0,)),
        ([row(1), row(2), row(3)], (0, 1, 2)),
        # one model at a time: that of the oldest row
        ([row(1, model="b"), row(2), row(3, model="b")], (0, 2)),
        ([row(number) for number in range(MAX_ROWS + 3)], tuple(range(MAX_ROWS))),
    ],
)
def test_what_runs_together(waiting: list[Row], wanted: tuple[int, ...]) -> None:
    assert EndsBatches().choose(waiting) == wanted


@pytest.mark.parametrize(
    ("left_s", "waiting", "is_held"),
    [
        # alone, new, or all here
        ({}, [row(1)], False),
        ({1: 0.9}, [row(1)], False),
        ({1: 0.9, 2: 0.9}, [row(1), row(2)], False),
        ({2: 0.9}, [row(1)], False),
        # the other one has been away as long
        ({1: 0.9, 2: 0.9}, [row(1)], True),
        ({1: 0.9, 2: 0.92}, [row(1)], True),
        ({1: 0.9, 2: 0.9, 3: 0.9}, [row(1), row(2, 1.001)], True),
        # it left much later, so it comes much later
        ({1: 0.9, 2: 0.95}, [row(1)], False),
        # it should have been back long ago
        ({1: 0.9, 2: 0.8}, [row(1)], False),
    ],
)
def test_whom_rows_are_held_for(left_s: dict[int, float], waiting: list[Row], is_held: bool) -> None:
    assert held_s(left_s, waiting) == pytest.approx(HOLD_SHARE * BATCH_S if is_held else 0.0)


def test_a_hold_is_bounded_whatever_a_batch_takes() -> None:
    assert held_s({1: 0.9, 2: 0.9}, [row(1)], batch_s=10.0) == pytest.approx(MAX_HOLD_S)


def test_sessions_that_are_gone_are_forgotten() -> None:
    batches = EndsBatches()
    batches.ran([1], BATCH_S, 1.0)
    batches.ran([2], BATCH_S, 100.0)
    assert set(batches._left_s) == {2}
