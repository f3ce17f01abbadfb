"""Text deltas never hold half a character or the beginning of a stop string."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm_client.generation.detokenizer import Detokenizer
from swarm_client.generation.prompt_format import common_prefix
from swarm_client.generation.sampling import TokenChooser
from swarm_client.generation.stopping import StopScanner
from swarm_client.generation.stream import NextToken, stream_text
from swarm_client.generation.text_session import SamplingParams, TextDelta, TokenLogprobs
from swarm_protocol.errors import CancelledStepError, StreamLostError


def decode_bytes(ids: Sequence[int]) -> str:
    """A byte tokenizer: ids are bytes."""
    return bytes(i for i in ids if i < 256).decode(errors="replace")


@given(st.text(max_size=40))
def test_deltas_put_together_are_the_text(text: str) -> None:
    detokenizer = Detokenizer(decode_bytes)
    deltas = [detokenizer.push(byte) for byte in text.encode()]
    assert "".join(deltas) + detokenizer.flush() == text
    assert all("\ufffd" not in delta for delta in deltas) or "\ufffd" in text


@pytest.mark.parametrize("text", ["é", "→", "🌸", "👩‍🔬"])
def test_a_character_comes_whole(text: str) -> None:
    detokenizer = Detokenizer(decode_bytes)
    deltas = [delta for byte in text.encode() if (delta := detokenizer.push(byte))]
    assert deltas == list(text)


def test_bytes_that_never_become_a_character_are_let_out() -> None:
    detokenizer = Detokenizer(decode_bytes)
    deltas = [detokenizer.push(0x80) for _ in range(20)]
    assert "".join(deltas) + detokenizer.flush() == "\ufffd" * 20


def test_tokens_without_a_text_do_not_break_the_character_behind_them() -> None:
    detokenizer = Detokenizer(decode_bytes)
    deltas = [detokenizer.push(token) for token in [97, *[300] * 20, *"🌸".encode(), 98]]
    assert [delta for delta in deltas if delta] == ["a", "🌸", "b"]


def test_what_a_token_adds_depends_on_the_one_before() -> None:
    def decode(ids: Sequence[int]) -> str:
        return " ".join("word" for _ in ids)  # as SentencePiece: no space in front of the first one

    detokenizer = Detokenizer(decode, context=[7, 8])
    assert detokenizer.push(9) == " word"
    assert detokenizer.push(9) == " word"


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_the_scanner_shows_what_is_before_the_first_stop_string(
    text: str, stop: list[str], data: st.DataObject
) -> None:
    scanner = StopScanner(stop)
    shown, fed = "", 0
    while fed < len(text) and not scanner.is_stopped:
        size = data.draw(st.integers(1, 4))
        shown += scanner.feed(text[fed : fed + size])
        fed += size
        assert not any(s in shown for s in stop)
    if not scanner.is_stopped:
        shown += scanner.flush()
    cuts = [text.find(s) for s in stop if s in text]
    if not cuts:
        assert shown == text
    else:
        # The earliest end decides which one is seen first; nothing at or behind a match is shown.
        assert text.startswith(shown)
        assert len(shown) <= max(cuts)
        assert not any(s in shown for s in stop)


def test_the_beginning_of_a_stop_string_is_held_until_it_is_none() -> None:
    scanner = StopScanner(["\nHuman:"])
    assert scanner.feed("hello\nHum") == "hello"
    assert scanner.feed("ming") == "\nHumming"
    assert scanner.feed("!\nHuman: x") == "!"
    assert scanner.is_stopped
    assert scanner.feed("more") == ""


def run(params: SamplingParams, tokens: Sequence[int | Exception], end_tokens: Sequence[int] = ()) -> list[TextDelta]:
    source: Iterator[int | Exception] = iter(tokens)

    def next_token() -> NextToken:
        token = next(source)
        if isinstance(token, Exception):
            raise token
        return NextToken(token, TokenLogprobs(token, -1.0) if params.logprobs is not None else None)

    return list(stream_text(params, next_token, decode_bytes, [], frozenset(end_tokens)))


def text_of(deltas: list[TextDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_an_answer_ends_at_its_length() -> None:
    deltas = run(SamplingParams(3), b"abcd")
    assert text_of(deltas) == "abc"
    assert [delta.finish_reason for delta in deltas] == [None, None, None, "length"]


def test_an_answer_ends_at_the_end_token_which_is_not_shown() -> None:
    deltas = run(SamplingParams(10), [97, 300, 98], [300])
    assert (text_of(deltas), deltas[-1].finish_reason, deltas[-1].token_ids) == ("a", "stop", (300,))


def test_the_end_token_is_ignored_on_request() -> None:
    assert text_of(run(SamplingParams(3, stop_at_eos=False), [97, 300, 98], [300])) == "ab"


def test_a_stop_string_over_several_tokens_is_cut_off() -> None:
    deltas = run(SamplingParams(10, stop=("END",)), b"xyENDz")
    assert (text_of(deltas), deltas[-1].finish_reason) == ("xy", "stop")
    assert sum(len(delta.token_ids) for delta in deltas) == 5


def test_what_was_held_back_comes_when_the_length_is_reached() -> None:
    assert text_of(run(SamplingParams(4, stop=("END",)), b"xyEN")) == "xyEN"


def test_logprobs_come_with_the_tokens_that_they_are_of() -> None:
    deltas = run(SamplingParams(12, logprobs=0, stop=("END",)), [*"é🌸".encode(), *b"aENDz"])
    for delta in deltas:
        assert tuple(found.token_id for found in delta.logprobs) == delta.token_ids
    assert sum(len(delta.token_ids) for delta in deltas) == 10
    assert not any(delta.logprobs for delta in run(SamplingParams(4), b"abcd"))


def test_a_cancelled_answer_says_so() -> None:
    deltas = run(SamplingParams(10), [97, CancelledStepError("")])
    assert (text_of(deltas), deltas[-1].finish_reason) == ("a", "cancelled")


def test_a_lost_node_is_an_error_after_the_text_so_far() -> None:
    with pytest.raises(StreamLostError):
        run(SamplingParams(10), [97, StreamLostError("")])


@pytest.mark.parametrize(
    ("first", "second", "length"), [([], [], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 9, 3], 1), ([4], [5], 0)]
)
def test_common_prefix(first: list[int], second: list[int], length: int) -> None:
    assert common_prefix(first, second) == length


def test_a_seed_gives_one_text_and_another_gives_another() -> None:
    logits = torch.zeros(1000)

    def draw(seed: int) -> list[int]:
        chooser = TokenChooser(SamplingParams(1, do_sample=True, seed=seed))
        return [chooser.choose(logits, [0] * position) for position in range(20)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert len(set(draw(1))) > 10


def test_a_position_draws_the_same_number_whatever_came_before() -> None:
    logits = torch.zeros(1000)
    chooser = TokenChooser(SamplingParams(1, do_sample=True, seed=5))
    later = chooser.choose(logits, [0] * 7)
    chooser.choose(logits, [0] * 3)
    assert chooser.choose(logits, [0] * 7) == later


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    chooser = TokenChooser(SamplingParams(1, do_sample=True, seed=3))
    counts = torch.zeros(4)
    for position in range(2000):
        counts[chooser.choose(probabilities.log(), [0] * position)] += 1
    assert torch.allclose(counts / 2000, probabilities, atol=0.04)
    assert counts[1] == 0


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(1),
        SamplingParams(1, do_sample=True, temperature=0),
        SamplingParams(1, do_sample=True, top_k=1),
        SamplingParams(1, do_sample=True, top_p=0.01),
        SamplingParams(1, do_sample=True, min_p=0.99),
        SamplingParams(1, do_sample=True, temperature=0.01),
    ],
    ids=["greedy", "temperature 0", "top_k", "top_p", "min_p", "cold"],
)
def test_narrow_settings_choose_the_best_token(params: SamplingParams) -> None:
    logits = torch.tensor([1.0, 4.0, 2.0, 3.0])
    assert TokenChooser(params).choose(logits, [0, 0]) == 1


def test_a_repetition_penalty_makes_greedy_choose_another() -> None:
    logits = torch.tensor([1.0, 4.0, 3.9])
    assert TokenChooser(SamplingParams(1, repetition_penalty=2.0)).choose(logits, [1]) == 2
