"""What a client knows of nodes: smoothed, of bounded age, its own measurements apart from what nodes say."""

import dataclasses

import pytest

from swarm_client.routing.prefix_holders import PrefixHolders
from swarm_client.routing.swarm_view import (
    FORGET_S,
    HOP_S,
    PING_AGE_S,
    SPEED_AGE_S,
    START_AGE_S,
    OwnSpeed,
    SwarmKnowledge,
)
from swarm_protocol.ids import PeerId
from swarm_protocol.messages import PAGE_TOKENS
from tests.client.test_find_route import record

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")


def knowledge(*names: str) -> SwarmKnowledge:
    known = SwarmKnowledge()
    known.read([record(name, 0, 10) for name in names], 0.0)
    return known


def test_pings_are_smoothed() -> None:
    known = knowledge("a")
    known.pinged(A, 0.1, 0.0)
    known.pinged(A, 0.2, 1.0)
    assert known.view(1.0).pings_s[A] == pytest.approx(0.13)
    for number in range(30):
        known.pinged(A, 0.2, 2.0 + number)
    assert known.view(40.0).pings_s[A] == pytest.approx(0.2, abs=1e-3)
    known.unreachable(A)
    assert not known.view(41.0).pings_s


def test_what_a_step_takes_beyond_ping_and_software_is_the_nodes() -> None:
    known = knowledge("a", "b")
    known.pinged(A, 0.1, 0.0)
    known.stepped(A, 5, 0.1 + HOP_S + 0.05, 1.0)
    known.stepped(B, 5, 0.2, 1.0)  # how far away it is is not known
    assert known.view(1.0).own == {A: OwnSpeed(pytest.approx(0.01), True)}
    assert known.view(1.0 + SPEED_AGE_S + 1).own == {A: OwnSpeed(pytest.approx(0.01), False)}


def test_what_was_measured_before_a_restart_or_long_ago_is_forgotten() -> None:
    known = knowledge("a", "b")
    for peer in (A, B):
        known.pinged(peer, 0.1, 0.0)
        known.stepped(peer, 5, 0.2, 0.0)
    known.read([record("a", 0, 10, incarnation=2), record("b", 0, 10)], 1.0)
    assert set(known.view(1.0).own) == {B}
    known.read(known.records, FORGET_S + 2)
    assert (known.view(FORGET_S + 2).own, known.view(FORGET_S + 2).pings_s) == ({}, {})


def test_pings_are_due_for_the_unknown_and_the_nearest_whose_pings_are_old() -> None:
    known = knowledge(*"abcdefgh")
    known.read([*known.records, record("i", 0, 10, state="joining")], 0.0)
    order = list[PeerId].sort
    assert known.due_pings(20, (), 0.0, order) == list("abcdefgh")
    assert known.due_pings(20, {A}, 0.0, order) == list("bcdefgh")
    for number, name in enumerate("abcde"):
        known.pinged(PeerId(name), 0.1 - number / 100, 0.0)
    assert known.due_pings(20, (), 1.0, order) == list("fgh")
    assert known.due_pings(4, (), PING_AGE_S, order) == list("edfg")
    assert known.due_pings(8, (), PING_AGE_S, order) == list("edcbafgh")


def test_published_pings_name_only_nodes_that_are_there() -> None:
    records = [record("a", 0, 5, pings_s=(("b", 0.01), ("z", 0.02))), record("b", 5, 10)]
    known = SwarmKnowledge()
    known.read(records, 0.0)
    said = known.view(0.0).said
    assert (said.near.tolist(), said.far.tolist(), said.pings_s.tolist()) == ([0], [1], [0.01])


def test_incarnations_are_those_of_the_records() -> None:
    known = SwarmKnowledge()
    known.read([dataclasses.replace(record("a", 0, 1), incarnation=7)], 0.0)
    assert (known.incarnation(A), known.incarnation(B)) == (7, 0)


def test_records_of_an_earlier_start_are_passed_over_while_they_may_turn_up() -> None:
    known = SwarmKnowledge()
    old, new = record("a", 0, 5, incarnation=3), record("a", 20, 25, incarnation=4)
    known.read([old], 0.0)
    known.read([new], 10.0)
    known.read([old, record("b", 0, 5)], 20.0)
    assert [r.peer_id for r in known.records] == ["b"], "where the new record could not be read, the old one comes back"
    known.read([new], 30.0)
    assert known.records == (new,)
    known.read([old], 31.0 + START_AGE_S)
    assert known.records == (old,), "a clock may have been set back"


def test_holders_of_a_prompt_are_known_by_its_longest_beginning() -> None:
    holders = PrefixHolders()
    pages = [bytes([number]) for number in range(4)]
    holders.remember(pages[:2], [A, B])
    holders.remember(pages[:3], [B, C])
    assert holders.affinity(pages) == {A: 2 * PAGE_TOKENS, B: 3 * PAGE_TOKENS, C: 3 * PAGE_TOKENS}
    assert holders.affinity([b"other", *pages]) == {}
    holders.forget(B)
    assert holders.affinity(pages) == {A: 2 * PAGE_TOKENS, C: 3 * PAGE_TOKENS}


def test_the_oldest_prompts_are_forgotten() -> None:
    holders = PrefixHolders()
    for number in range(5000):
        holders.remember([number.to_bytes(2, "big")], [A])
    assert holders.affinity([(0).to_bytes(2, "big")]) == {}
    assert holders.affinity([(4999).to_bytes(2, "big")])
