"""What a client may ask for, tables and edges; and how an answer is measured."""

from dataclasses import replace

import pytest

from app.config import GenerationLimits, SocketLimits
from app.kept_conversations import AddressCount
from app.limits import FrameRate, answer_length, is_expired, is_flood, session_length, tokens_per_s
from app.native_generation import AnswerMeter, native_sampling
from app.request_models import Generate
from swarm_protocol.errors import MaxLengthError

SOCKETS, GENERATION = SocketLimits(), GenerationLimits(session_max_length=1000, max_new_tokens=100)


@pytest.mark.parametrize(
    ("frames", "is_too_much"), [([], False), (["x"] * 64, False), (["x"] * 65, True), (["x" * 600_000] * 2, True)]
)
def test_flood(frames, is_too_much):
    assert is_flood(frames, SOCKETS) is is_too_much


@pytest.mark.parametrize(("now_s", "expired"), [(10.0, False), (309.9, False), (310.0, True)])
def test_idle(now_s, expired):
    assert is_expired(10.0, now_s, SOCKETS) is expired


@pytest.mark.parametrize(
    ("asked", "model_max", "length"), [(None, 512, 512), (None, 9999, 1000), (300, 512, 300), (4000, 512, 512)]
)
def test_session_length(asked, model_max, length):
    assert session_length(asked, model_max, GENERATION) == length


@pytest.mark.parametrize(
    ("asked", "position", "length"), [(None, 0, 100), (None, 950, 50), (7, 0, 7), (7, 998, 2), (5000, 0, 100)]
)
def test_answer_length(asked, position, length):
    assert answer_length(asked, position, 1000, GENERATION) == length


def test_a_full_session_has_no_answer():
    with pytest.raises(MaxLengthError):
        answer_length(None, 1000, 1000, GENERATION)


@pytest.mark.parametrize(("tokens", "end_s", "speed"), [(0, 5.0, None), (4, 1.0, None), (4, 3.0, 2.0)])
def test_speed(tokens, end_s, speed):
    assert tokens_per_s(tokens, 1.0, end_s) == speed


def test_an_answer_is_measured_from_its_second_piece():
    meter = AnswerMeter(started_s=10.0)
    assert meter.timings().ttft_s is None
    for count, now_s in [(0, 10.1), (2, 10.5), (1, 11.0), (1, 11.5)]:
        meter.count(count, now_s)
    assert (meter.num_tokens, meter.timings().ttft_s, meter.timings().tokens_per_s) == (4, 0.5, 2.0)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, (True, 0.6, 0.9)),
        ({"temperature": 0}, (False, None, None)),
        ({"temperature": 1.2, "top_p": 0.5}, (True, 1.2, 0.5)),
        ({"do_sample": False}, (False, None, None)),
    ],
)
def test_sites_defaults_fill_what_a_request_leaves_open(params, expected):
    request = Generate.model_validate({"id": "a", "messages": [{"role": "user", "content": "x"}], "params": params})
    found = native_sampling(request, 5, GenerationLimits())
    assert (found.do_sample, found.temperature, found.top_p) == expected


def test_frames_that_come_too_fast_are_a_flood_however_soon_they_are_answered():
    rate = FrameRate(replace(SocketLimits(), max_queued_frames=3))
    assert [rate.is_flood(now_s) for now_s in (0.0, 1.0, 2.0, 9.9, 10.0, 10.1)] == [False] * 3 + [True] + [False] * 2


def test_places_of_an_address_are_counted_and_given_back():
    count = AddressCount(1)
    with count.one("a") as first, count.one("a") as second, count.one("b") as other:
        assert (first, second, other) == (True, False, True)
    with count.one("a") as again, AddressCount(0).one("a") as unlimited:
        assert (again, unlimited) == (True, True)
