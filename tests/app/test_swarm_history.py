"""What test answers say of a day and a month: how often they came, how fast, and since when they do not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.canary_history import CanaryRun
from app.swarm_history import DAY_S, MONTH_S, RECENT_S, Incident, history_report, incidents, period, recent_speed

NOW = 100 * DAY_S


def run(ago_s: float, outcome: str = "ok", tokens_per_s: float | None = 5.0) -> CanaryRun:
    came = outcome == "ok"
    return CanaryRun("m", NOW - ago_s, outcome, 0.5 if came else None, tokens_per_s if came else None, 2 if came else 0)


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ("", []),
        ("ooo", []),
        ("oxo", [(20, 10, False)]),
        ("oxxo", [(30, 20, False)]),
        ("xoxx", [(20, 20, True), (40, 10, False)]),
        ("x", [(10, 10, True)]),
    ],
)
def test_incidents_are_runs_of_failures(outcomes: str, expected: list[tuple[int, int, bool]]) -> None:
    ordered = [
        run(10.0 * (len(outcomes) - number), "ok" if letter == "o" else "timeout")
        for number, letter in enumerate(outcomes)
    ]
    found = incidents(ordered, NOW)
    assert found == tuple(Incident(NOW - ago_s, lasted_s, "timeout", is_open) for ago_s, lasted_s, is_open in expected)


def test_the_cause_is_that_of_the_first_failure() -> None:
    (found,) = incidents([run(30, "missing_blocks"), run(20, "timeout"), run(10)], NOW)
    assert found.cause == "missing_blocks"


def test_a_day_and_a_month_are_told_apart() -> None:
    runs = [run(40 * DAY_S, "timeout"), run(10 * DAY_S, "timeout"), run(3600, tokens_per_s=4.0), run(10)]
    found = history_report(runs, NOW)
    assert (found.day.num_runs, found.day.uptime) == (2, 1.0)
    assert (found.day.lowest, found.day.highest, found.day.first_token_s) == (4.0, 5.0, 0.5)
    assert (found.day.min_replicas, found.month.min_replicas) == (2, 0)
    assert (found.month.num_runs, found.month.uptime) == (3, pytest.approx(2 / 3))
    assert len(found.incidents) == 1


def test_without_runs_nothing_is_claimed() -> None:
    found = period([], DAY_S, NOW)
    figures = (found.uptime, found.lowest, found.highest, found.first_token_s, found.min_replicas)
    assert figures == (None,) * 5
    assert found.points == ()


RUNS = st.lists(
    st.tuples(st.floats(0, MONTH_S), st.sampled_from(["ok", "timeout"]), st.floats(0.1, 100) | st.none()), max_size=40
)


@given(RUNS)
def test_points_lie_within_the_picture_and_uptime_is_a_share(drawn: list[tuple[float, str, float | None]]) -> None:
    runs = [run(ago_s, outcome, speed) for ago_s, outcome, speed in drawn]
    found = history_report(runs, NOW)
    for each in (found.day, found.month):
        assert all(0 < point.at < 1 and 0 <= (point.level or 0) <= 1 for point in each.points)
        assert [point.at for point in each.points] == sorted({point.at for point in each.points})
        assert (each.uptime is None) == (each.num_runs == 0)
        assert 0 <= (each.uptime or 0) <= 1
    assert found.month.num_runs == len(runs)
    assert sum(incident.is_open for incident in found.incidents) <= 1
    assert all(incident.lasted_s >= 0 for incident in found.incidents)


def test_only_a_recent_answer_tells_the_speed() -> None:
    assert recent_speed([], NOW) is None
    assert recent_speed([run(10), run(3000, tokens_per_s=1.0)], NOW) == 5.0
    assert recent_speed([run(RECENT_S + 1)], NOW) is None
    assert recent_speed([run(20), run(10, "timeout")], NOW) is None
