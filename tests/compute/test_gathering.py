"""A step is held for sessions that are about to come, and for nobody else."""

import pytest

from server_node.compute.gathering import HOLD_SHARE, MAX_HOLD_S, Gathering

BATCH_S = 0.040
HOLD_S = HOLD_SHARE * BATCH_S


def met(*away_s: float, batch_s: float = BATCH_S) -> Gathering:
    """Sessions 0, 1, … that came back after so long once, and whose next outputs left together at 10.0."""
    gathering = Gathering()
    for session, away in enumerate(away_s):
        gathering.arrived(session, "blocks", 0.0)
        gathering.answered([session], batch_s, 1.0)
        gathering.arrived(session, "blocks", 1.0 + away)
    gathering.answered(range(len(away_s)), batch_s, 10.0)
    return gathering


def hold_s(gathering: Gathering, here: dict[int, float], now_s: float, group: str = "blocks") -> float:
    """Let sessions arrive at their times and ask at `now_s`."""
    for session, arrived_s in here.items():
        gathering.arrived(session, group, arrived_s)
    return gathering.hold_s(here, now_s)


@pytest.mark.parametrize(
    ("away_s", "here", "now_s", "wanted_s"),
    [
        # alone: never held
        ([0.010], {0: 10.010}, 10.010, 0.0),
        # the other one is due as well, and late after half as long again and a millisecond
        ([0.010, 0.010], {0: 10.008}, 10.008, 0.008),
        ([0.010, 0.010], {0: 10.008}, 10.015, 0.001),
        # late: not counted on any more
        ([0.010, 0.010], {0: 10.008}, 10.017, 0.0),
        # all are here
        ([0.010, 0.010], {0: 10.008, 1: 10.009}, 10.009, 0.0),
        # the last of several decides, but not for longer than a share of the batch
        ([0.004, 0.004, 0.010], {0: 10.004}, 10.004, 0.012),
        ([0.004, 0.019], {0: 10.004}, 10.004, HOLD_S),
        # a way back that is long against a batch is not waited for, be it on its last metres
        ([0.010, 0.200], {0: 10.010}, 10.010, 0.0),
        ([0.010, 0.200], {0: 10.199}, 10.199, 0.0),
        # one that waited while the device was busy waits from then on, not twice
        ([0.010, 0.010], {0: 9.990}, 10.000, 0.016),
        ([0.010, 0.010], {0: 9.990}, 10.010, 0.006),
    ],
)
def test_how_long_a_step_is_held(away_s: list[float], here: dict[int, float], now_s: float, wanted_s: float) -> None:
    assert hold_s(met(*away_s), here, now_s) == pytest.approx(wanted_s, abs=1e-9)


def test_nothing_is_known_of_sessions_that_never_came_back() -> None:
    gathering = Gathering()
    for session in range(2):
        gathering.arrived(session, "blocks", 0.0)
    gathering.answered([0, 1], BATCH_S, 10.0)
    assert hold_s(gathering, {0: 10.001}, 10.001) == 0.0


def test_sessions_on_other_blocks_are_not_waited_for() -> None:
    assert hold_s(met(0.010, 0.010), {0: 10.008}, 10.008, group="other blocks") == 0.0


def test_a_slow_device_holds_no_longer_than_people_notice() -> None:
    gathering = met(0.040, 0.040, batch_s=2.0)
    assert hold_s(gathering, {0: 10.005}, 10.005) == pytest.approx(MAX_HOLD_S)


def test_a_fast_device_holds_for_nobody_who_is_slower_than_it() -> None:
    assert hold_s(met(0.004, 0.004, batch_s=0.005), {0: 10.004}, 10.004) == 0.0


def test_a_pause_does_not_count_as_a_way_back() -> None:
    gathering = met(0.010, 0.010)
    gathering.arrived(1, "blocks", 25.0)
    gathering.answered([1], BATCH_S, 25.04)
    assert hold_s(gathering, {0: 25.045}, 25.045) == pytest.approx(0.011)


def test_the_way_back_follows_what_it_becomes() -> None:
    gathering, now_s = met(0.010, 0.010), 10.0
    for _ in range(40):
        gathering.arrived(1, "blocks", now_s + 0.5)
        now_s += 1.0
        gathering.answered([1], BATCH_S, now_s)
    assert hold_s(gathering, {0: now_s + 0.01}, now_s + 0.01) == 0.0


def test_sessions_that_are_gone_are_forgotten() -> None:
    gathering = met(0.010, 0.010)
    gathering.arrived(0, "blocks", 200.0)
    gathering.answered([0], BATCH_S, 200.0)
    assert set(gathering._seen) == {0}
