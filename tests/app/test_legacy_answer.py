"""The predecessor's replies and stop sequences, with scripted pieces of text."""

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.answering import AnswerFacts, answering
from app.caller import Caller
from app.config import SiteConfig
from app.legacy_answer import LegacyAnswer, StopRules
from app.legacy_generation import LegacyPlan, legacy_replies, legacy_sampling, plan_answer
from app.model_registry import ModelRegistry
from app.request_models import LegacyGenerate
from app.site import Site
from swarm_client.generation.text_session import TextDelta
from swarm_protocol.errors import InvalidRequestError, MaxLengthError
from tests.app.fake_swarm import FakeModel

SITE = Site(SiteConfig(), ModelRegistry([]))


FACTS = AnswerFacts("test", "m", "", Caller("192.0.2.1"))


def replies_to(model, session, request):
    return legacy_replies(model, session, request, partial(answering, SITE, FACTS))


def answer_of(script, request, max_length=100, prompt="Q"):
    """Return the replies to one generate as tuples, and the session."""
    model = FakeModel(script=script)
    session = model.open_session(max_length)
    replies = list(replies_to(model, session, LegacyGenerate(inputs=prompt, **request)))
    return [(reply.outputs, reply.stop, reply.token_count) for reply in replies if reply is not None], session


@pytest.mark.parametrize(
    ("script", "request_fields", "replies", "session_text"),
    [
        pytest.param(["a", "b", "c"], {"max_new_tokens": 2}, [("ab", True, 2)], "Qab", id="one reply"),
        pytest.param(
            ["a", "</s>"], {"max_new_tokens": 1, "stop_sequence": "</s>"},
            [("a", False, 1), ("</s>", True, 1)], "Qa</s>", id="the model's own end is the stop",
        ),
        pytest.param(
            ["a", "\n"], {"max_new_tokens": 1, "stop_sequence": "\n"},
            [("a", False, 1), ("\n", True, 1)], "Qa\n", id="token stream",
        ),
        pytest.param(
            ["a", "b", "c", "d", "#"], {"max_new_tokens": 2, "stop_sequence": "#"},
            [("ab", False, 2), ("cd", False, 2), ("#", True, 1)], "Qabcd#", id="replies of two tokens",
        ),
        pytest.param(
            ["a", "#", "#", "#", "b"], {"max_new_tokens": 1, "stop_sequence": "###"},
            [("a", False, 1), ("#", False, 1), ("#", False, 1), ("#", True, 1)], "Qa###", id="a stop of many tokens",
        ),
        pytest.param(
            ["a", "b###c"], {"max_new_tokens": 1, "stop_sequence": "###"},
            [("a", False, 1), ("b###", True, 1)], "Qab###", id="a stop inside a piece is cut behind it",
        ),
        pytest.param(
            ["a", "\n\n"], {"max_new_tokens": 1, "stop_sequence": "</s>", "extra_stop_sequences": ["\n\n"]},
            [("a", False, 1), ("\n\n", True, 1)], "Qa</s>", id="an extra stop gives way to the stop",
        ),
        pytest.param(
            ["a", "\n\nHuman"], {"max_new_tokens": 1, "stop_sequence": "###", "extra_stop_sequences": ["\n\n"]},
            [("a", False, 1), ("\n\n", True, 1)], "Qa###", id="an extra stop inside a piece",
        ),
        pytest.param(
            ["a", "</s>"], {"max_new_tokens": 1, "stop_sequence": "\n"},
            [("a", False, 1), ("", True, 1)], "Qa</s>", id="the model's end without the stop",
        ),
        pytest.param(
            [" é", "…", "!"], {"max_new_tokens": 1, "stop_sequence": "!"},
            [(" é", False, 1), ("!", True, 2)], "Q é…!", id="held back until it decodes",
        ),
        pytest.param(["a", "b", "c"], {"max_length": 3}, [("ab", True, 2)], "Qab", id="max_length is of the session"),
        pytest.param(
            ["a", "b", "c"], {"max_length": 3, "stop_sequence": "#"}, [("ab", True, 2)], "Qab",
            id="max_length with a stop that never comes",
        ),
    ],
)  # fmt: skip
def test_replies_are_those_of_the_predecessor(script, request_fields, replies, session_text):
    found, session = answer_of(script, request_fields)
    assert found == replies
    assert session.text == session_text


def test_an_answer_without_its_stop_ends_in_the_length_error():
    model = FakeModel(script=["a"], is_endless=True)
    session = model.open_session(10)
    replies = []
    with pytest.raises(MaxLengthError, match="Maximum length exceeded: prefix 9"):
        replies.extend(replies_to(model, session, LegacyGenerate(inputs="Q", max_new_tokens=2, stop_sequence="#")))
    assert len(session.ids) == 9


@pytest.mark.parametrize(
    ("fields", "position", "expected"),
    [
        ({"max_new_tokens": 5}, 10, LegacyPlan(5, None)),
        ({"max_new_tokens": 5, "max_length": 7}, 10, LegacyPlan(5, None)),
        ({"max_length": 30}, 10, LegacyPlan(20, None)),
        ({"max_length": 30, "stop_sequence": "x"}, 10, LegacyPlan(20, None)),
        ({"max_new_tokens": 1, "stop_sequence": "x"}, 10, LegacyPlan(90, 1)),
        ({"max_new_tokens": 4, "stop_sequence": "x"}, 10, LegacyPlan(88, 4)),
        ({"max_new_tokens": 1, "stop_sequence": "x"}, 100, MaxLengthError),
        ({"max_length": 10}, 10, InvalidRequestError),
        ({}, 10, InvalidRequestError),
    ],
)
def test_lengths(fields, position, expected):
    if isinstance(expected, LegacyPlan):
        assert plan_answer(LegacyGenerate(**fields), position, 100) == expected
    else:
        with pytest.raises(expected):
            plan_answer(LegacyGenerate(**fields), position, 100)


@pytest.mark.parametrize(
    ("fields", "do_sample", "temperature"),
    [
        ({}, False, None),
        ({"temperature": 0.5}, False, None),
        ({"do_sample": True, "temperature": 0.5}, True, 0.5),
        ({"do_sample": True, "temperature": 0}, False, None),
    ],
)
def test_sampling(fields, do_sample, temperature):
    params = legacy_sampling(LegacyGenerate(top_k=0, **fields), 4)
    assert (params.do_sample, params.temperature, params.top_k) == (do_sample, temperature, None)


def test_a_first_generate_needs_inputs_and_later_ones_go_on():
    model = FakeModel(script=["a", "b"])
    session = model.open_session(20)
    with pytest.raises(InvalidRequestError, match="inputs"):
        list(replies_to(model, session, LegacyGenerate(max_new_tokens=1)))
    list(replies_to(model, session, LegacyGenerate(inputs="Q", max_new_tokens=1)))
    list(replies_to(model, session, LegacyGenerate(max_new_tokens=1)))
    assert session.text == "Qab"


@given(st.lists(st.text("ab#\n", min_size=1, max_size=5), min_size=1, max_size=12), st.integers(1, 3))
def test_any_cut_of_a_text_stops_at_the_same_place(pieces, reply_tokens):
    whole = "".join(pieces)
    rules = StopRules("##", ("\n",), (7, 8), lambda text: [ord(letter) for letter in text])
    answer = LegacyAnswer(rules, reply_tokens)
    outputs, is_end = "", False
    for piece in pieces:
        step = answer.feed(TextDelta(piece, (1,)))
        outputs += step.reply.outputs if step.reply else ""
        if step.is_end:
            is_end = True
            break
    if not is_end:
        outputs += answer.finish().outputs
    ends = [whole.find(stop) + len(stop) for stop in ("##", "\n") if stop in whole]
    assert outputs == (whole[: min(ends)] if ends else whole)
    assert is_end == bool(ends)
