"""Spans, ids and the error tree."""

import inspect
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_protocol import errors
from swarm_protocol.errors import CacheFullError, MissingBlocksError, RemoteError, SwarmError, error_from_wire
from swarm_protocol.ids import is_model_name, parse_peer_id, short_id, short_peer
from swarm_protocol.messages import error_reply
from swarm_protocol.spans import Span, describe_blocks, uncovered


@pytest.mark.parametrize("text", ["", "3", "3:", ":3", "3:3", "4:3", "-1:3", "a:b", "1:2:3", " 1:2", "٣:٤:"])
def test_what_is_no_span_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="span"):
        Span.parse(text)


def test_a_span_reads_as_it_is_written() -> None:
    assert Span.parse("0:15") == Span(0, 15)
    assert str(Span(0, 15)) == "0:15"
    assert describe_blocks(Span(0, 15)) == "blocks 0–14"
    assert describe_blocks(Span(3, 4)) == "block 3"
    assert Span(2, 9).contains(Span(3, 9))
    assert not Span(2, 9).contains(Span(1, 3))


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), max_size=6), st.integers(1, 20))
def test_uncovered_blocks_are_those_of_no_span(starts: list[tuple[int, int]], num_blocks: int) -> None:
    spans = [Span(start, start + length) for start, length in starts]
    holes = uncovered(spans, num_blocks)
    missing = {block for hole in holes for block in range(hole.start, hole.end)}
    assert missing == {b for b in range(num_blocks) if not any(s.start <= b < s.end for s in spans)}
    assert all(a.end < b.start for a, b in itertools.pairwise(holes))


def all_errors() -> list[type[SwarmError]]:
    return [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, SwarmError)]


def test_every_error_has_a_code_of_its_own_and_stands_in_the_drawing() -> None:
    codes = [cls.code for cls in all_errors() if cls is not RemoteError]
    assert len(set(codes)) == len(codes)
    for cls in all_errors():
        assert cls.__name__ in (errors.__doc__ or "")
        leaf = not cls.__subclasses__() and cls not in (RemoteError, SwarmError)
        line = next(line for line in (errors.__doc__ or "").splitlines() if cls.__name__ in line)
        if leaf:
            assert cls.code in line.split()
            assert ("retryable" in line.split()) == cls.retryable


@pytest.mark.parametrize("cls", all_errors(), ids=lambda cls: cls.__name__)
def test_an_error_arrives_as_the_class_that_was_sent(cls: type[SwarmError]) -> None:
    if cls is RemoteError:
        return
    arrived = error_from_wire(cls.code, "what happened", cls.retryable)
    assert type(arrived) is cls
    assert str(arrived) == "what happened"


def test_a_code_from_the_future_keeps_its_meaning() -> None:
    arrived = error_from_wire("brand_new", "text", True)
    assert (arrived.code, arrived.retryable, str(arrived)) == ("brand_new", True, "text")


@pytest.mark.parametrize("code", ["X-Evil: 1\r\nSet-Cookie", "", "a" * 41, "Über", "<b>"])
def test_a_code_that_is_none_is_not_repeated(code: str) -> None:
    assert error_from_wire(code, "text", False).code == "remote_error"


@pytest.mark.parametrize("code", ["cache_full", "brand_new"])
def test_a_strangers_text_is_one_visible_line(code: str) -> None:
    arrived = error_from_wire(code, "now\r\nthen \x1b[31m red \u202e gpj.exe" + "x" * 1000, True)
    assert str(arrived).startswith("now then [31m red gpj.exe")
    assert len(str(arrived)) == 300
    assert str(arrived).isprintable()


def test_error_texts_are_cut_to_what_the_wire_takes() -> None:
    reply = error_reply(SwarmError("x" * 5000), 3)
    assert (len(reply.message), reply.step_id) == (1000, 3)


def test_messages_name_the_numbers() -> None:
    assert str(CacheFullError(10, 4)) == "attention cache is full: 10 tokens needed, 4 free"
    missing = MissingBlocksError("m", [Span(3, 4), Span(12, 16)])
    assert str(missing) == "no node of the swarm serves block 3, blocks 12–15 of m now"
    assert missing.missing == (Span(3, 4), Span(12, 16))


def test_ids() -> None:
    assert parse_peer_id("12D3KooWabc") == "12D3KooWabc"
    for text in ("", "0OIl", "a b", "x" * 129):
        with pytest.raises(ValueError, match="peer id"):
            parse_peer_id(text)
    assert short_peer(parse_peer_id("12D3KooWabcdef")) == "…abcdef"
    assert short_id(bytes(16)) == "00000000"
    assert is_model_name("org/model-1.5_b")
    assert not is_model_name("../etc")
