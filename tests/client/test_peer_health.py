"""A peer that failed is left alone until it proves alive, longer each time; one that is full until its next record."""

import pytest

from swarm_client.routing.peer_health import FORGET_S, LONGEST_PAUSE_S, PeerHealth
from swarm_protocol.ids import PeerId
from tests.client.test_find_route import record

PEER = PeerId("a")
PAUSE_S = 10.0


def failed_once() -> PeerHealth:
    health = PeerHealth(PAUSE_S)
    health.failed(PEER, 1, 100.0)
    return health


def prove(health: PeerHealth, at_s: float) -> None:
    health.read([record("a", 0, 1, published_s=at_s)], at_s)
    health.answered(PEER, at_s)


@pytest.mark.parametrize(
    ("published_s", "answered_s", "now_s", "is_avoided"),
    [
        (None, None, 1000.0, True),
        (105.0, None, 1000.0, True),
        (None, 105.0, 1000.0, True),
        (99.0, 105.0, 1000.0, True),
        (105.0, 99.0, 1000.0, True),
        (105.0, 106.0, 109.0, True),
        (105.0, 106.0, 110.0, False),
    ],
    ids=["nothing", "record only", "ping only", "old record", "old ping", "within the pause", "proven"],
)
def test_a_record_and_a_ping_after_the_failure_prove_a_peer_alive_once_the_pause_is_over(
    published_s: float | None, answered_s: float | None, now_s: float, is_avoided: bool
) -> None:
    health = failed_once()
    if published_s is not None:
        health.read([record("a", 0, 1, published_s=published_s)], published_s)
    if answered_s is not None:
        health.answered(PEER, answered_s)
    assert health.avoided(now_s) == ({PEER} if is_avoided else set())


def test_a_restart_needs_no_pause_and_no_ping() -> None:
    health = failed_once()
    health.read([record("a", 0, 1, published_s=101.0, incarnation=1)], 101.0)
    assert health.avoided(101.0)
    health.read([record("a", 0, 1, published_s=101.0, incarnation=2)], 101.0)
    assert not health.avoided(101.0)


def test_each_failure_after_a_proof_doubles_the_pause_up_to_a_bound() -> None:
    health = failed_once()
    now_s, pauses = 100.0, []
    for _ in range(9):
        start_s = now_s
        while health.avoided(now_s):
            now_s += 1.0
            prove(health, now_s)
        pauses.append(now_s - start_s)
        health.failed(PEER, 1, now_s)
    assert pauses == [10, 20, 40, 80, 160, 320, LONGEST_PAUSE_S, LONGEST_PAUSE_S, LONGEST_PAUSE_S]


def test_a_crash_loop_is_told_by_the_pause_although_restarts_need_none() -> None:
    health = failed_once()
    health.read([record("a", 0, 1, published_s=101.0, incarnation=2)], 101.0)
    health.failed(PEER, 2, 102.0)
    prove(health, 113.0)
    assert health.avoided(121.0)
    assert not health.avoided(122.0)


def test_sessions_that_fail_together_are_one_failure() -> None:
    health = failed_once()
    for _ in range(20):
        health.failed(PEER, 1, 100.5)
    prove(health, 110.6)
    assert not health.avoided(110.6)


def test_a_step_that_goes_through_ends_all_doubt() -> None:
    health = failed_once()
    health.worked(PEER)
    assert not health.avoided(100.0)
    health.failed(PEER, 1, 200.0)
    prove(health, 210.0)
    assert not health.avoided(210.0)


def test_a_full_peer_is_avoided_until_its_next_record() -> None:
    health = PeerHealth(PAUSE_S)
    health.refused(PEER, 100.0)
    health.read([record("a", 0, 1, published_s=99.0)], 100.0)
    assert health.avoided(100.0) == {PEER}
    health.read([record("a", 0, 1, published_s=101.0)], 101.0)
    assert not health.avoided(101.0)


def test_pings_are_due_when_only_they_are_missing() -> None:
    health = failed_once()
    assert health.due_pings(120.0) == []
    health.read([record("a", 0, 1, published_s=101.0)], 101.0)
    assert health.due_pings(109.0) == []
    assert health.due_pings(110.0) == [PEER]
    health.answered(PEER, 110.0)
    assert health.due_pings(110.0) == []


def test_what_never_comes_back_is_forgotten() -> None:
    health = failed_once()
    health.refused(PeerId("b"), 100.0)
    health.read([], 100.0 + FORGET_S + 1)
    assert not health.avoided(100.0 + FORGET_S + 1)
