"""What each peer may take of the device, in tables."""

import pytest

from server_node.compute.device_shares import DeviceShares, ShareLimits
from swarm_protocol.ids import PeerId

ALICE, BOB = PeerId("alice"), PeerId("bob")
LIMITS = ShareLimits(burst_s=2.0, share=0.125, active_s=3.0)


def shares() -> DeviceShares:
    return DeviceShares(LIMITS)


@pytest.mark.parametrize(
    ("charges", "wanted_s"),
    [
        ([], 2.0),
        # within the burst a piece costs what it took
        ([(0.5, 0.0)], 1.5),
        ([(0.5, 0.5)], 1.5),
        # at the end of it only what others lost
        ([(1.5, 0.0), (1.0, 0.0)], 0.0),
        ([(1.5, 0.0), (1.0, 0.4)], -0.4),
        ([(1.5, 0.0), (1.0, 1.0)], -0.5),
        ([(9.0, 0.0), (9.0, 0.0), (1.0, 1.0), (1.0, 0.5)], -1.5),
    ],
)
def test_what_pieces_cost(charges: list[tuple[float, float]], wanted_s: float) -> None:
    accounts = shares()
    for taken_s, delay_s in charges:
        accounts.charge(BOB, taken_s, delay_s, 0.0)
    assert accounts.balance_s(BOB, 0.0) == pytest.approx(wanted_s)
    assert accounts.balance_s(ALICE, 0.0) == 2.0


def test_what_was_taken_comes_back_with_time_but_no_more() -> None:
    accounts = shares()
    accounts.charge(BOB, 3.0, 3.0, 0.0)
    assert accounts.balance_s(BOB, 8.0) == pytest.approx(0.0)
    assert accounts.is_over(BOB, 8.0)
    assert not accounts.is_over(BOB, 12.0)
    assert accounts.balance_s(BOB, 1e6) == 2.0


def test_a_peer_that_owes_is_held_while_others_decode_and_until_it_has_paid() -> None:
    accounts = shares()
    accounts.charge(BOB, 3.0, 3.0, 0.0)
    assert accounts.wait_s(BOB, 0.0) == 0.0
    accounts.decoded([BOB], 0.0)
    assert accounts.wait_s(BOB, 0.0) == 0.0
    accounts.decoded([ALICE], 1.0)
    assert accounts.wait_s(BOB, 1.0) == pytest.approx(3.0)
    assert accounts.wait_s(ALICE, 1.0) == 0.0
    accounts.decoded([ALICE], 6.0)
    assert accounts.wait_s(BOB, 6.0) == pytest.approx(2.0)
    assert accounts.wait_s(BOB, 8.0) == pytest.approx(0.0)


def test_peers_that_come_and_go_leave_nothing() -> None:
    accounts = shares()
    accounts.charge(BOB, 1.0, 0.0, 0.0)
    accounts.decoded([ALICE], 0.0)
    accounts.forget(2.0)
    assert len(accounts) == 2
    accounts.forget(4.0)
    assert ALICE not in accounts
    accounts.forget(8.1)
    assert len(accounts) == 0


def test_a_clock_that_stands_or_steps_back_earns_nothing() -> None:
    accounts = shares()
    accounts.charge(BOB, 1.0, 0.0, 10.0)
    accounts.charge(BOB, 0.5, 0.0, 9.0)
    assert accounts.balance_s(BOB, 10.0) == pytest.approx(0.5)
