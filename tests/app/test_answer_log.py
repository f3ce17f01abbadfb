"""The log of an answer and the book of those who may come back, as tables and for all cuts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.answer_log import AnswerLog, KeepLimits, ResumeBook

sizes = st.lists(st.integers(1, 40), max_size=30)


def log_of(lengths: list[int], max_bytes: int) -> AnswerLog:
    log = AnswerLog(max_bytes)
    for length in lengths:
        log.append(lambda seq, length=length: f"{seq}:".ljust(length, "x"))
    return log


def read_all(log: AnswerLog, from_seq: int) -> list[str]:
    found: list[str] = []
    while (frame := log.read(from_seq + len(found))) is not None:
        found.append(frame)
    return found


@given(sizes, st.integers(0, 40))
def test_whoever_was_cut_off_anywhere_reads_the_rest_once_and_in_order(lengths, cut):
    log = log_of(lengths, 10_000)
    whole = read_all(log, 0)
    cut = min(cut, len(lengths))
    assert whole[:cut] + read_all(log, cut) == whole
    assert [int(frame.split(":")[0]) for frame in whole] == list(range(len(lengths)))


@given(sizes, st.integers(1, 200))
def test_the_ring_keeps_its_size_and_says_what_it_lost(lengths, max_bytes):
    log = log_of(lengths, max_bytes)
    assert log.size_bytes <= max_bytes or log.next_seq - log.first_seq == 1
    assert log.size_bytes == sum(map(len, read_all(log, log.first_seq))) == log.unread_bytes(log.first_seq)
    assert log.next_seq == len(lengths)
    for lost in range(log.first_seq):
        assert not log.has(lost)
        with pytest.raises(LookupError):
            log.read(lost)


@pytest.mark.parametrize("seq", [-1, 4])
def test_a_number_that_never_was_is_refused(seq):
    log = log_of([3, 3, 3], 100)
    assert not log.has(seq)
    with pytest.raises(LookupError):
        log.read(seq)


def book(per_address: int = 2, in_all: int = 3) -> ResumeBook[str]:
    return ResumeBook(KeepLimits(per_address, in_all, text_s=600.0))


def test_a_text_is_kept_for_its_time_and_then_known_as_expired():
    kept = book()
    kept.add("t", "talk", "a")
    assert kept.find("t", 0.0) == "talk"
    assert kept.detach("t", 10.0)
    assert kept.find("t", 9999.0) == "talk"  # an answer that runs is looked after by somebody else
    kept.ended("t", 20.0)
    assert kept.find("t", 619.9) == "talk"
    assert kept.find("t", 620.0) == "expired"
    assert kept.find("other", 620.0) == "unknown"
    assert len(kept) == 0


def test_one_that_is_taken_back_does_not_expire():
    kept = book()
    kept.add("t", "talk", "a")
    kept.detach("t", 0.0)
    kept.ended("t", 1.0)
    kept.attach("t", "b")
    assert kept.find("t", 9999.0) == "talk"
    kept.ended("t", 5.0)  # the word of the socket before comes late
    assert kept.find("t", 9999.0) == "talk"


def test_an_address_keeps_only_so_many_that_run():
    kept = book(per_address=2)
    for token in "abc":
        kept.add(token, token, "one")
    assert [kept.detach(token, 0.0) for token in "abc"] == [True, True, False]
    assert kept.find("c", 0.0) == "unknown"
    kept.add("d", "d", "two")
    assert kept.detach("d", 0.0)
    kept.add("e", "e", "three")
    assert not kept.detach("e", 0.0)  # three in all


def test_texts_make_room_the_oldest_first():
    kept = book(per_address=2)
    for token in "abc":
        kept.add(token, token, "one")
    for token in "ab":
        kept.detach(token, 0.0)
        kept.ended(token, 1.0)
    assert kept.detach("c", 2.0)
    assert [kept.find(token, 2.0) for token in "abc"] == ["expired", "b", "c"]


def test_one_that_was_forgotten_is_not_kept():
    kept = book()
    kept.add("t", "talk", "a")
    kept.forget("t")
    assert not kept.detach("t", 0.0)
    assert kept.find("t", 0.0) == "unknown"


@given(
    st.lists(st.tuples(st.sampled_from(["add", "detach", "ended", "attach", "find"]), st.integers(0, 5)), max_size=60)
)
def test_no_order_of_events_keeps_more_than_may_be(events):
    kept = book(per_address=2, in_all=3)
    for now_s, (event, number) in enumerate(events):
        token, address = str(number), str(number % 2)
        if event == "add":
            kept.add(token, token, address)
        elif event == "attach":
            if kept.find(token, now_s) == token:
                kept.attach(token, address)
        else:
            {"detach": kept.detach, "ended": kept.ended, "find": kept.find}[event](token, float(now_s))
        assert kept.num_detached <= 3
