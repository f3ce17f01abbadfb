"""The report on where time went: its parts add up to the clock, whatever overlaps, fails or is waited for."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_client.generation_times import GenerationTimes, HopTimes, TimeShares
from swarm_client.leg import HopTiming
from swarm_client.routing.find_route import Hop
from swarm_client.time_log import MAX_KEPT, TimeLog
from swarm_protocol.ids import PeerId
from swarm_protocol.spans import Span

FIRST, SECOND = Hop(PeerId("12D3KooWaaaaaa"), Span(0, 2)), Hop(PeerId("12D3KooWbbbbbb"), Span(2, 5))


def timing(hop: Hop, total_s: float, queue_s: float = 0.0, compute_s: float = 0.0) -> HopTiming:
    return HopTiming(hop, total_s, queue_s, compute_s)


def shares(found: TimeShares) -> tuple[float, ...]:
    parts = (found.queue_s, found.compute_s, found.wire_s, found.client_s, found.stall_s)
    return tuple(round(part, 6) for part in parts)


def test_a_token_is_its_hops_and_the_client_before_and_behind_them() -> None:
    log = TimeLog()
    log.resume(10.0)
    log.stepped(10.5, 12.0, 7, [timing(FIRST, 0.6, 0.1, 0.4), timing(SECOND, 0.8, 0.0, 0.5)])
    log.pause(12.25)
    log.resume(20.0)  # the caller took its time in between
    log.stepped(20.0, 21.0, 1, [timing(FIRST, 0.5, 0.0, 0.4), timing(SECOND, 0.4, 0.1, 0.2)])
    log.pause(21.5)
    found = log.report()
    assert shares(found.first_token) == (0.1, 0.9, 0.4, 0.85, 0.0)
    assert shares(found.per_token) == (0.1, 0.6, 0.2, 0.6, 0.0)
    assert found.num_tokens == 2
    assert found.total.total_s == pytest.approx(2.25 + 1.5)
    assert [(hop.span, hop.num_steps, shares(hop.per_token)[:3]) for hop in found.hops] == [
        (Span(0, 2), 2, (0.0, 0.4, 0.1)),
        (Span(2, 5), 2, (0.1, 0.2, 0.1)),
    ]


def test_guesses_that_were_right_share_the_time_of_their_step() -> None:
    log = TimeLog()
    log.stepped(0.0, 1.0, 7, [timing(FIRST, 0.5)])
    for start_s, drafted, accepted in ((1.0, 3, 3), (2.0, 2, 0), (3.0, 0, 0)):
        log.drafts(drafted)
        log.stepped(start_s, start_s + 1.0, 1 + drafted, [timing(FIRST, 0.5)])
        assert log.is_last_a_token
        log.accepted(accepted)
    found = log.report()
    assert (found.num_tokens, found.drafted_tokens, found.accepted_tokens) == (7, 5, 3)
    assert found.per_token.wire_s == pytest.approx(0.25)
    assert found.hops[0].per_token.wire_s == pytest.approx(0.25)
    assert "3 of 5 guessed tokens were right" in found.as_table()
    assert found.as_json()["accepted_tokens"] == 3


def test_a_session_without_resume_counts_from_its_first_step_on() -> None:
    log = TimeLog()
    for start_s in (0.0, 2.0, 4.0):
        log.stepped(start_s, start_s + 1.0, 1, [timing(FIRST, 1.0, 0.0, 0.75)])
    found = log.report()
    assert shares(found.total) == (0.0, 2.25, 0.75, 2.0, 0.0)
    assert shares(found.per_token) == (0.0, 0.75, 0.25, 0.5, 0.0)  # of 1.0 s and, for the last one, of nothing yet


def test_pieces_that_run_at_several_hops_at_once_are_shares_of_the_clock() -> None:
    log = TimeLog()
    pieces = [timing(hop, 1.0, 0.0, 0.5) for hop in (FIRST, SECOND) for _ in range(3)]
    log.stepped(0.0, 3.0, 300, pieces)
    assert shares(log.report().total) == (0.0, 1.5, 1.5, 0.0, 0.0)


def test_a_recovery_is_a_stall_and_disturbs_no_median() -> None:
    log = TimeLog()
    log.stepped(0.0, 1.0, 5, [timing(FIRST, 1.0)])
    log.stepped(1.0, 2.0, 1, [timing(FIRST, 1.0)])
    log.stepped(2.0, 7.0, 1, [timing(FIRST, 1.0)], stalled_s=3.5)
    log.recovered(6)
    log.pause(7.0)
    found = log.report()
    assert shares(found.total) == (0.0, 0.0, 3.0, 0.5, 3.5)
    assert shares(found.per_token) == (0.0, 0.0, 1.0, 0.0, 0.0)
    assert (found.num_recoveries, found.recomputed_tokens) == (1, 6)


def test_a_failed_step_and_a_wait_for_the_first_route_are_stalls_of_the_step_that_comes() -> None:
    log = TimeLog()
    log.resume(0.0)
    log.opened(0.5, 4.5, stalled_s=3.0)
    log.failed(4.5, 6.0)
    log.stepped(6.0, 7.0, 9, [timing(FIRST, 1.0, 0.0, 1.0)])
    log.pause(7.0)
    found = log.report()
    assert shares(found.first_token) == (0.0, 1.0, 1.0, 0.5, 4.5)
    assert found.total.total_s == pytest.approx(7.0)


def test_a_restart_forgets_everything() -> None:
    log = TimeLog()
    log.stepped(0.0, 1.0, 5, [timing(FIRST, 1.0)])
    log.failed(1.0, 2.0)
    log.recovered(3)
    log.restart()
    assert log.report() == TimeLog().report() == GenerationTimes(0, *[TimeShares()] * 3, ())


@pytest.mark.parametrize(
    ("queue_s", "compute_s"), [(float("nan"), 1.0), (5.0, 5.0), (-1.0, 0.5), (1.0, float("nan")), (float("inf"), 0.0)]
)
def test_what_a_node_says_of_itself_is_bounded_by_what_the_client_saw(queue_s: float, compute_s: float) -> None:
    log = TimeLog()
    log.stepped(0.0, 2.0, 1, [timing(FIRST, 2.0, queue_s, compute_s)])
    found = log.report()
    assert found.total.total_s == pytest.approx(2.0)
    assert min(shares(found.total)) >= 0.0


def test_long_sessions_keep_no_more_than_so_many_steps() -> None:
    log = TimeLog()
    for number in range(MAX_KEPT + 100):
        log.stepped(float(number), number + 1.0, 1, [timing(FIRST, 1.0, 0.0, 1.0 if number < 100 else 0.5)])
    found = log.report()
    assert found.num_tokens == MAX_KEPT + 100
    assert found.per_token.compute_s == 0.5
    assert len(log._steps.tokens) == MAX_KEPT


SECONDS = st.floats(0.0, 10.0)
HOPS = st.lists(st.builds(timing, st.sampled_from([FIRST, SECOND]), SECONDS, SECONDS, SECONDS), min_size=0, max_size=6)
STEPS = st.lists(st.tuples(SECONDS, SECONDS, HOPS, SECONDS, SECONDS), max_size=8)


@given(STEPS)
def test_the_parts_of_a_text_add_up_to_the_clock(
    steps: Sequence[tuple[float, float, list[HopTiming], float, float]],
) -> None:
    log, now_s, counted_s = TimeLog(), 0.0, 0.0
    for before_s, wall_s, hops, stalled_s, behind_s in steps:
        log.resume(now_s)
        log.stepped(now_s + before_s, now_s + before_s + wall_s, 1, hops, stalled_s)
        log.pause(now_s + before_s + wall_s + behind_s)
        counted_s += before_s + wall_s + behind_s
        now_s += before_s + wall_s + behind_s + 100.0
    found = log.report()
    assert found.total.total_s == pytest.approx(counted_s, abs=1e-6)
    assert all(part >= 0 for part in shares(found.total))
    assert sum(hop.total.wire_s for hop in found.hops) == pytest.approx(found.total.wire_s, abs=1e-6)


REPORT = GenerationTimes(
    41,
    TimeShares(0.01, 2.0, 0.5, 0.3, 0.4),
    TimeShares(0.01, 0.4, 0.1, 0.02, 0.0),
    TimeShares(0.0, 0.04, 0.01, 0.007, 0.0),
    (HopTimes(Span(0, 15), FIRST.peer_id, 41, TimeShares(0.01, 1.0, 0.25), TimeShares(0.0, 0.02, 0.005)),),
    1,
    120,
)


def test_the_table_is_readable_as_text() -> None:
    assert REPORT.as_table() == (
        "41 tokens in 3.21 s; 17.5 tokens/s; recovered once, 120 tokens computed again\n\n"
        "| ms      | first token | per token, median |     all |\n"
        "| ------- | ----------: | ----------------: | ------: |\n"
        "| queue   |       10.00 |              0.00 |   10.00 |\n"
        "| compute |      400.00 |             40.00 | 2000.00 |\n"
        "| wire    |      100.00 |             10.00 |  500.00 |\n"
        "| client  |       20.00 |              7.00 |  300.00 |\n"
        "| stall   |        0.00 |              0.00 |  400.00 |\n"
        "| all     |      530.00 |             57.00 | 3210.00 |\n\n"
        "| hop, ms per token      | queue | compute | wire |\n"
        "| ---------------------- | ----: | ------: | ---: |\n"
        "| blocks 0–14 at …aaaaaa |  0.00 |   20.00 | 5.00 |"
    )
    assert TimeLog().report().as_table().startswith("0 tokens in 0.00 s")


def test_the_json_form_is_json() -> None:
    found = json.loads(json.dumps(REPORT.as_json()))
    assert found["tokens"] == 41
    assert found["total"]["total_s"] == pytest.approx(3.21)
    assert found["hops"][0] == {
        "blocks": "0:15",
        "peer": "…aaaaaa",
        "steps": 41,
        "total": {"queue_s": 0.01, "compute_s": 1.0, "wire_s": 0.25},
        "per_token": {"queue_s": 0.0, "compute_s": 0.02, "wire_s": 0.005},
    }
    assert (found["recoveries"], found["recomputed_tokens"]) == (1, 120)
