"""A tape holds what went into a hop, through roll-backs and permutations, within its budget."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm_protocol.errors import TapeLostError
from swarm_protocol.messages import PAGE_TOKENS
from swarm_protocol.prefix_tapes import PrefixTapes
from swarm_protocol.prompt_pages import PromptPages
from swarm_protocol.tape import Tape, TapeBudget
from swarm_protocol.tensors import from_wire, to_wire

ROWS, HIDDEN = 3, 2
ORDERS = st.lists(st.integers(0, ROWS - 1), min_size=ROWS, max_size=ROWS).map(tuple)
EVENTS = st.lists(
    st.one_of(st.integers(0, 4), st.tuples(st.just("cut"), st.floats(0, 1)), ORDERS),
    max_size=30,
)


def made(number: int, columns: int) -> torch.Tensor:
    return torch.randn(ROWS, columns, HIDDEN, generator=torch.Generator().manual_seed(number))


@given(events=EVENTS, shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_part_is_what_a_cache_would_have_seen(events: Sequence[object], shares: tuple[float, float]) -> None:
    budget = TapeBudget(1 << 20)
    tape, whole = Tape(budget), torch.zeros(ROWS, 0, HIDDEN)
    for number, event in enumerate(events):
        match event:
            case int():
                tape.write(whole.shape[1], to_wire(made(number, event)))
                whole = torch.cat([whole, made(number, event)], dim=1)
            case ("cut", float() as part):
                length = int(part * whole.shape[1])
                tape.cut(length)
                whole = whole[:, :length]
            case tuple():
                tape.reorder(event)
                whole = whole[list(event)]
    assert tape.length == whole.shape[1]
    start, end = sorted(int(share * whole.shape[1]) for share in shares)
    if start < end:
        assert torch.equal(from_wire(tape.part(start, end)), whole[:, start:end])
    with pytest.raises(TapeLostError):
        tape.part(0, tape.length + 1)
    assert budget.used_bytes == whole.nbytes
    tape.drop()
    assert budget.used_bytes == 0


def test_a_tape_that_does_not_fit_is_empty_until_it_begins_anew() -> None:
    budget = TapeBudget(made(0, 3).nbytes)
    tape, other = Tape(budget), Tape(budget)
    other.write(0, to_wire(made(0, 1)))
    tape.write(0, to_wire(made(1, 2)))
    assert tape.is_whole
    tape.write(2, to_wire(made(2, 1)))
    assert not tape.is_whole
    assert budget.used_bytes == made(0, 1).nbytes
    tape.write(1, to_wire(made(3, 1)))
    assert (tape.length, tape.is_whole, budget.used_bytes) == (2, False, made(0, 1).nbytes)
    tape.write(0, to_wire(made(4, 2)))
    assert tape.is_whole
    assert other.is_whole


def pages(number: int) -> list[torch.Tensor]:
    return [torch.randn(1, PAGE_TOKENS, HIDDEN, generator=torch.Generator().manual_seed(at)) for at in range(number)]


def test_what_one_session_leaves_is_what_the_next_begins_with() -> None:
    budget, hashes = TapeBudget(1 << 20), (b"a", b"b", b"c")
    tape, prompt = Tape(budget), PromptPages(budget.prefixes, hashes)
    assert prompt.begin(tape, 0) == 0
    whole = torch.cat([*pages(3), torch.zeros(1, 5, HIDDEN)], dim=1)
    for first, last in ((0, 100), (100, 150)):
        prompt.writes(tape, first)
        tape.write(first, to_wire(whole[:, first:last]))
        prompt.keep(tape)
    later, used_bytes = Tape(budget), budget.used_bytes
    found = PromptPages(budget.prefixes, hashes).begin(later, 3 * PAGE_TOKENS)
    assert found == 2 * PAGE_TOKENS  # the third was not complete
    assert budget.used_bytes == used_bytes
    later.write(128, to_wire(whole[:, 128:197]))
    assert torch.equal(from_wire(later.part(0, 197)), whole)
    later.cut(70)
    assert torch.equal(from_wire(later.part(0, 70)), whole[:, :70])
    later.drop()
    assert PromptPages(budget.prefixes, hashes).begin(Tape(budget), PAGE_TOKENS) == PAGE_TOKENS


@pytest.mark.parametrize(("first", "again", "kept"), [(64, 10, 1), (100, 70, 1), (40, 20, 0), (100, 100, 2)])
def test_no_page_is_kept_that_a_roll_back_reached_into(first: int, again: int, kept: int) -> None:
    budget, hashes = TapeBudget(1 << 20), (b"a", b"b")
    tape, prompt = Tape(budget), PromptPages(budget.prefixes, hashes)
    whole = torch.cat(pages(2), dim=1)
    for position, states in ((0, whole[:, :first]), (again, whole[:, : 128 - again])):
        prompt.writes(tape, position)
        tape.write(position, to_wire(states))
        prompt.keep(tape)
    assert len(budget.prefixes.find(hashes)) == kept


def test_a_share_counts_for_the_whole_and_ends_with_either() -> None:
    whole = TapeBudget(4 * made(0, 1).nbytes)
    first, second = (Tape(TapeBudget(3 * made(0, 1).nbytes, whole)) for _ in range(2))
    first.write(0, to_wire(made(0, 3)))
    second.write(0, to_wire(made(0, 1)))
    assert (first.is_whole, second.is_whole, whole.used_bytes) == (True, True, whole.max_bytes)
    second.write(1, to_wire(made(1, 1)))  # would fit into its share
    assert not second.is_whole
    first.write(3, to_wire(made(1, 1)))  # would fit into the whole
    assert (first.is_whole, whole.used_bytes) == (False, 0)
    assert whole.prefixes is first.budget.prefixes


def test_the_least_recently_used_pages_go_first_and_ends_before_beginnings() -> None:
    prefixes = PrefixTapes(3 * pages(1)[0].nbytes)
    for name in (b"a", b"b", b"c"):
        prefixes.keep(name, to_wire(pages(1)[0]))
    assert len(prefixes.find((b"a", b"b"))) == 2
    prefixes.keep(b"d", to_wire(pages(1)[0]))  # in the place of c
    assert not prefixes.find((b"c",))
    prefixes.keep(b"e", to_wire(pages(1)[0]))  # in the place of b, behind a
    assert len(prefixes.find((b"a", b"b"))) == 1
    assert prefixes.used_bytes == prefixes.max_bytes


def test_a_hole_makes_a_tape_useless() -> None:
    budget = TapeBudget(1 << 20)
    tape = Tape(budget)
    tape.write(0, to_wire(made(0, 2)))
    tape.write(3, to_wire(made(1, 1)))
    assert (tape.is_whole, tape.length, budget.used_bytes) == (False, 4, 0)
