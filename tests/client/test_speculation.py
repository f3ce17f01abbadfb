"""Guessing tokens ahead: drafts, when they pay, and texts that are the same with and without."""

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm_client import SamplingParams
from swarm_client.generation.ends_worker import ChosenToken, EndsRow, run_rows
from swarm_client.generation.sampling import TokenChooser
from swarm_client.generation.speculation import (
    DRAFT_MOST,
    MATCH_LEAST,
    TRY_LENGTH,
    DraftLength,
    PromptLookup,
    Speculator,
    StepCost,
    StepTimes,
    check_speculation,
    num_accepted,
)
from swarm_client.generation.text_model import DistributedTextModel, DistributedTextSession
from swarm_protocol.errors import ConfigError, MaxLengthError
from swarm_protocol.spans import Span
from tests.client.test_model import Pair
from tests.client.test_text_sessions import Words

SETTINGS: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "temperature": 1.3, "seed": 5},
    {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 6},
]

GREEDY = TokenChooser(SamplingParams(1))
PROMPT = "5 17 31 8"
SPANS = (Span(0, 2), Span(2, 5))
"""Of the nodes of `Pair`."""

small_ids = st.lists(st.integers(0, 3), max_size=40)


# what is guessed


@given(small_ids, st.integers(0, 20))
def test_a_draft_is_what_followed_the_longest_known_end(token_ids: list[int], most: int) -> None:
    found = PromptLookup().draft(token_ids, most)
    assert len(found) <= most
    for length in (4, 3, 2):
        end = token_ids[-length:]
        places = [at for at in range(length, len(token_ids)) if token_ids[at - length : at] == end]
        if places and len(token_ids) > length:
            expected = token_ids[places[-1] :]
            while len(expected) < most:
                expected = expected + expected
            assert found == tuple(expected[:most])
            return
    assert found == ()


@given(small_ids, small_ids)
def test_a_lookup_that_follows_a_text_finds_what_a_new_one_finds(first: list[int], more: list[int]) -> None:
    lookup = PromptLookup()
    lookup.draft(first, 5)
    for end in range(len(more) + 1):
        assert lookup.draft(first + more[:end], 5) == PromptLookup().draft(first + more[:end], 5)
    assert lookup.draft(more, 5) == PromptLookup().draft(more, 5)  # another text altogether


@given(small_ids, small_ids)
def test_accepted_is_the_common_beginning(draft: list[int], chosen: list[int]) -> None:
    count = num_accepted(draft, chosen)
    assert draft[:count] == chosen[:count]
    assert count == min(len(draft), len(chosen)) or draft[count] != chosen[count]


def test_unknown_choices_are_refused() -> None:
    assert [check_speculation(choice) for choice in ("off", "ngram", "draft")] == ["off", "ngram", "draft"]
    with pytest.raises(ConfigError, match="off, ngram, draft"):
        check_speculation("oracle")


# when it pays


def simulate(acceptance: float, column_share: float, queue_share: float = 0.0, num_tokens: int = 3000) -> float:
    """Return the tokens per time of a step that drafts bring, which are right with a probability."""
    times = StepTimes()
    rng, length, tokens, time = random.Random(7), DraftLength(times), 0, 0.0
    while tokens < num_tokens:
        drafted = length.best(DRAFT_MOST)[1]
        right = next((count for count in range(drafted) if rng.random() >= acceptance), drafted)
        seconds = (1 + column_share * drafted) * rng.uniform(0.95, 1.05)
        if drafted:
            length.compared(right, right < drafted)
        else:
            is_right = rng.random() < acceptance
            length.compared(int(is_right), not is_right)
        times.stepped(drafted, StepCost(seconds, queue_share, 1.0))
        tokens += 1 + right
        time += seconds
    return tokens / time


@pytest.mark.parametrize(
    ("acceptance", "column_share", "least"),
    [
        (0.0, 0.01, 0.97),
        (0.0, 1.0, 0.97),
        (0.3, 0.01, 1.2),
        (0.5, 0.1, 1.2),
        (0.5, 1.0, 0.97),
        (0.8, 0.01, 3.0),
        (0.95, 0.01, 7.0),
        (0.95, 1.0, 0.97),
        (0.99, 0.05, 6.5),
    ],
)
def test_drafts_gain_where_they_can_and_never_lose(acceptance: float, column_share: float, least: float) -> None:
    assert simulate(acceptance, column_share) >= least


def test_nothing_is_sent_while_others_keep_a_node_busy() -> None:
    times = StepTimes()
    length = DraftLength(times)
    length.compared(100, False)
    times.stepped(0, StepCost(0.3, 0.0, 0.1))
    assert length.best(8)[1] == 2
    times.stepped(2, StepCost(0.3, 0.0, 0.1))
    assert length.best(8)[1] == 4
    for _ in range(20):
        times.stepped(0, StepCost(0.4, 0.1, 0.1))
    assert length.best(8) == (1.0, 0)
    for _ in range(20):
        times.stepped(0, StepCost(0.3, 0.0, 0.1))
    assert length.best(8)[1] == 2


def test_drafts_are_judged_before_they_are_sent() -> None:
    speculator, text = Speculator(), [1, 2, 3, 4]
    sent = []
    for at in range(60):
        draft = speculator.draft(text, 6, GREEDY)
        sent.append(len(draft))
        right = [at_next % 4 + 1 for at_next in range(len(text), len(text) + 7)]
        chosen = right[: num_accepted(draft, right) + 1]
        speculator.came(draft, chosen, StepCost(0.1) if at else None)
        text += chosen
    assert sent[:2] == [0, 0]  # what a step takes is not known yet
    assert sent[-1] == 6
    assert MATCH_LEAST == 2


class Sure:
    """A drafter that is right with a probability, and takes `token_s` for each token."""

    def __init__(self, acceptance: float, token_s: float) -> None:
        self.token_s, self._acceptance, self._rng = token_s, acceptance, random.Random(5)
        self.num_asked = 0

    def is_ready(self, _: Sequence[int]) -> bool:
        return True

    def draft(self, token_ids: Sequence[int], most: int, _: TokenChooser) -> tuple[int, ...]:
        self.num_asked += most
        at = len(token_ids)
        return tuple(at + i if self._rng.random() < self._acceptance else -1 for i in range(most))


def ask(acceptance: float, token_share: float, num_tokens: int = 3000) -> float:
    """Return the tokens per time of a step that a draft model brings, a token of which takes `token_share` steps."""
    rng, drafter = random.Random(7), Sure(acceptance, token_share)
    speculator, text, time = Speculator(drafter), list(range(1000)), 0.0
    while len(text) < 1000 + num_tokens:
        asked = drafter.num_asked
        draft = speculator.draft(text, 40, GREEDY)
        right = list(range(len(text), len(text) + len(draft) + 1))
        chosen = right[: num_accepted(draft, right) + 1]
        seconds = (1 + 0.05 * len(draft)) * rng.uniform(0.95, 1.05)
        speculator.came(draft, chosen, StepCost(seconds))
        text += chosen
        time += seconds + (drafter.num_asked - asked) * token_share
    return num_tokens / time


@pytest.mark.parametrize(
    ("acceptance", "token_share", "least"),
    [
        (0.95, 0.1, 2.5),
        (0.8, 0.1, 1.8),
        (0.6, 0.1, 1.25),
        (0.0, 0.1, 0.97),
        (0.3, 0.5, 0.97),
        (0.95, 0.5, 1.2),
        (0.95, 1.5, 0.999),
        (0.0, 0.6, 0.97),
    ],
)
def test_a_draft_model_is_asked_where_it_pays(acceptance: float, token_share: float, least: float) -> None:
    assert ask(acceptance, token_share) >= least


def test_a_draft_model_that_becomes_right_is_asked_again() -> None:
    drafter = Sure(0.0, 0.1)
    speculator, text, sent = Speculator(drafter), list(range(1000)), list[int]()
    for step in range(400):
        if step == 200:
            drafter._acceptance = 1.0
        draft = speculator.draft(text, 40, GREEDY)
        sent.append(len(draft))
        right = list(range(len(text), len(text) + len(draft) + 1))
        chosen = right[: num_accepted(draft, right) + 1]
        speculator.came(draft, chosen, StepCost(1.0 + 0.02 * len(draft)))
        text += chosen
    assert sum(sent[50:200]) <= 3 * TRY_LENGTH
    assert sum(sent[300:]) / 100 > 5


def test_what_was_said_before_is_looked_up_and_not_asked_for() -> None:
    drafter = Sure(0.5, 0.1)
    speculator, text = Speculator(drafter), [1, 2, 3, 4] * 3
    for _ in range(40):
        draft = speculator.draft(text, 15, GREEDY)
        asked = drafter.num_asked
        right = [at % 4 + 1 for at in range(len(text), len(text) + 16)]
        chosen = right[: num_accepted(draft, right) + 1]
        speculator.came(draft, chosen, StepCost(1.0 + 0.02 * len(draft)))
        text += chosen
    assert draft == tuple(right[:15])
    assert drafter.num_asked == asked


# the head


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair("llama", tmp_path_factory.mktemp("llama"))
    with pair.served:
        yield pair


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_the_head_takes_what_it_takes_one_by_one(pair: Pair, params: dict[str, Any]) -> None:
    ends, chooser = pair.remote.ends, TokenChooser(SamplingParams(1, logprobs=1, **params))
    states = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(3))
    context, alone = [7, 9], list[ChosenToken]()
    for column in range(5):
        row = EndsRow(ends, chooser, states[:, column : column + 1], context + [one.token_id for one in alone])
        found = run_rows([row])[0]
        assert isinstance(found, ChosenToken)
        alone.append(found)
    wanted = [one.token_id for one in alone]
    other = EndsRow(ends, TokenChooser(SamplingParams(1)), states[:, :1], [4])
    for right in range(5):
        draft = (*wanted[:right], *[token_id + 1 for token_id in wanted[right:4]])
        row = EndsRow(ends, chooser, states, context, draft=draft)
        first, found, last = run_rows([other, row, other])
        assert isinstance(found, ChosenToken)
        tokens = (*found.before, found)
        assert [token.token_id for token in tokens] == wanted[: right + 1]
        assert [token.logprobs.token_id for token in tokens if token.logprobs] == wanted[: right + 1]
        assert found.embedded is not None
        assert alone[right].embedded is not None
        assert torch.allclose(found.embedded, alone[right].embedded, atol=1e-6)
        assert isinstance(first, ChosenToken)
        assert isinstance(last, ChosenToken)
        assert first.token_id == last.token_id == run_rows([other])[0].token_id  # type: ignore[union-attr]


# whole sessions


class Guesses:
    """A speculator that knows the text and is wrong now and then; `sent` are its drafts.

    `at_next` is called once, when a draft of several tokens is about to be sent.
    """

    def __init__(self, text: list[int], wrong_each: int = 5) -> None:
        self.text, self.wrong_each = text, wrong_each
        self.sent: list[tuple[int, ...]] = []
        self.at_next: Callable[[], None] | None = None

    def draft(self, token_ids: list[int], most: int, _: TokenChooser) -> tuple[int, ...]:
        at = len(token_ids)
        right = self.text[at : at + min(most, 1 + len(self.sent) % 6)]
        found = tuple(t if (at + i) % self.wrong_each else (t + 1) % 90 for i, t in enumerate(right))
        self.sent.append(found)
        if len(found) > 1 and self.at_next is not None:
            act, self.at_next = self.at_next, None
            act()
        return found

    def came(self, draft: tuple[int, ...], chosen: list[int], _: StepCost | None) -> None:
        assert len(chosen) <= len(draft) + 1
        assert chosen[:-1] == list(draft[: len(chosen) - 1])


@pytest.fixture
def model(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> DistributedTextModel:
    monkeypatch.setattr(type(pair.remote.checkpoint), "tokenizer", lambda _: Words())
    monkeypatch.setattr("swarm_client.generation.text_model._end_tokens", lambda *_: frozenset())
    return pair.remote.text_model()


@pytest.fixture
def session(model: DistributedTextModel) -> Iterator[DistributedTextSession]:
    session = model.open_session(120, speculation="ngram")
    yield session
    session.close()


def plain_ids(model: DistributedTextModel, prompt: str, num_tokens: int, **params: Any) -> list[int]:
    """Return the tokens of a session without speculation, the prompt's among them."""
    session = model.open_session(120, speculation="off")
    session.append_text(prompt)
    list(session.generate(SamplingParams(num_tokens, **params)))
    assert session.times.drafted_tokens == 0
    session.close()
    return list(session.token_ids)


def guess(session: DistributedTextSession, text: list[int], wrong_each: int = 5) -> Guesses:
    guesses = Guesses(text, wrong_each)
    session._speculator = guesses  # type: ignore[assignment]
    return guesses


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_a_text_is_the_same_with_guesses_and_needs_fewer_steps(
    model: DistributedTextModel,
    session: DistributedTextSession,
    params: dict[str, Any],
) -> None:
    wanted = plain_ids(model, PROMPT, 60, logprobs=1, **params)
    guesses = guess(session, wanted)
    session.append_text(PROMPT)
    deltas = list(session.generate(SamplingParams(60, logprobs=1, **params)))
    assert list(session.token_ids) == wanted
    assert [token_id for delta in deltas for token_id in delta.token_ids] == wanted[4:]
    assert [one.token_id for delta in deltas for one in delta.logprobs] == wanted[4:]
    assert len(guesses.sent) < 40
    times = session.times
    assert times.num_tokens == 60
    assert times.drafted_tokens == sum(map(len, guesses.sent)) > times.accepted_tokens == 60 - len(guesses.sent)
    assert times.per_token.total_s > 0


@pytest.mark.parametrize("params", SETTINGS[:2], ids=str)
def test_prompt_lookup_changes_no_token(
    model: DistributedTextModel, session: DistributedTextSession, params: dict[str, Any]
) -> None:
    prompt = "5 17 31 8 5 17 31 8 5 17 31 8"
    wanted = plain_ids(model, prompt, 100, **params)
    session.append_text(prompt)
    list(session.generate(SamplingParams(100, **params)))
    assert list(session.token_ids) == wanted


def test_a_session_is_never_filled_beyond_its_end(model: DistributedTextModel) -> None:
    wanted = plain_ids(model, PROMPT, 20)
    session = model.open_session(24, speculation="ngram")
    guess(session, [*wanted, *range(20)], wrong_each=1000)
    session.append_text(PROMPT)
    assert len(list(session.generate(SamplingParams(20)))) > 0
    assert list(session.token_ids) == wanted
    with pytest.raises(MaxLengthError):
        session.generate(SamplingParams(1))
    session.close()


def test_what_came_behind_a_stop_string_is_forgotten(
    model: DistributedTextModel, session: DistributedTextSession
) -> None:
    wanted = plain_ids(model, PROMPT, 60)
    session.append_text(PROMPT)
    for _ in range(4):
        guess(session, wanted, wrong_each=1000)
        before = len(session.token_ids)
        stop = Words().decode([wanted[before + 3]])
        text = "".join(delta.text for delta in session.generate(SamplingParams(20, stop=(stop,))))
        ended = len(session.token_ids)
        assert before < ended <= before + 4
        assert list(session.token_ids) == wanted[:ended]
        assert text == Words().decode(wanted[before:ended])[: -len(stop)]
    more = plain_ids(model, Words().decode([*wanted[:ended], 61, 62]), 10)
    session.append_text("61 62")
    guess(session, more)
    list(session.generate(SamplingParams(10)))
    assert list(session.token_ids) == more


def test_an_end_token_ends_the_answer_within_a_run(
    model: DistributedTextModel, session: DistributedTextSession
) -> None:
    wanted = plain_ids(model, PROMPT, 30)
    end = next(at for at in range(8, 30) if wanted[at] not in wanted[4:at])
    guess(session, wanted, wrong_each=1000)
    session._end_tokens = frozenset([wanted[end]])
    session.append_text(PROMPT)
    deltas = list(session.generate(SamplingParams(30)))
    assert deltas[-1].finish_reason == "stop"
    assert list(session.token_ids) == wanted[: end + 1]


def test_a_cancel_within_a_run_ends_it_and_the_session_goes_on(
    model: DistributedTextModel, session: DistributedTextSession
) -> None:
    wanted = plain_ids(model, PROMPT, 40)
    guess(session, wanted, wrong_each=1000)
    session.append_text(PROMPT)
    deltas = session.generate(SamplingParams(40))
    for _ in range(4):
        next(deltas)
    session.cancel()
    assert [delta.finish_reason for delta in deltas] == ["cancelled"]
    assert list(session.token_ids) == wanted[:8]
    list(session.generate(SamplingParams(36)))
    assert list(session.token_ids) == wanted


@pytest.mark.parametrize("is_taped", [True, False])
@pytest.mark.parametrize("params", SETTINGS[:2], ids=str)
def test_nodes_that_die_while_guesses_are_verified_change_no_token(
    pair: Pair,
    model: DistributedTextModel,
    session: DistributedTextSession,
    monkeypatch: pytest.MonkeyPatch,
    params: dict[str, Any],
    is_taped: bool,
) -> None:
    wanted = plain_ids(model, PROMPT, 40, **params)
    monkeypatch.setattr(pair.served.swarm._tapes, "max_bytes", 1 << 20 if is_taped else 0)
    guesses = guess(session, wanted)
    session.append_text(PROMPT)
    deltas = session.generate(SamplingParams(40, **params))
    next(deltas)
    # The last one first: the node before it has got the guesses then.
    for index in (1, 0):
        victim = pair.served.nodes[index]
        pair.served.add_node(SPANS[index])
        pair.served.nodes[index] = pair.served.nodes.pop()
        guesses.at_next = partial(pair.served.kill, victim)
        for _ in range(10):
            next(deltas)
        assert guesses.at_next is None
    list(deltas)
    assert list(session.token_ids) == wanted
    assert session.times.num_recoveries == 2


def test_streams_that_break_while_guesses_are_verified_change_no_token(
    pair: Pair, model: DistributedTextModel, session: DistributedTextSession
) -> None:
    wanted = plain_ids(model, PROMPT, 40)
    guesses = guess(session, wanted)
    session.append_text(PROMPT)
    deltas = session.generate(SamplingParams(40))
    next(deltas)
    for index, num_frames in ((0, 0), (1, 0), (0, 1), (1, 1)):
        guesses.at_next = partial(pair.served.break_streams, pair.served.nodes[index], num_frames)
        for _ in range(7):
            next(deltas)
        assert guesses.at_next is None
    list(deltas)
    assert list(session.token_ids) == wanted
