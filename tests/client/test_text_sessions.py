"""Text sessions through turns, cancels and early ends, on a tiny model whose tokenizer knows numbers."""

import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from swarm_client import ChatMessage, SamplingParams, Swarm, open_text_model
from swarm_client.events import SessionEvent, Waiting
from swarm_client.generation.text_model import DistributedTextModel, DistributedTextSession
from swarm_protocol.errors import CancelledStepError, InvalidRequestError, MaxLengthError, MissingBlocksError
from swarm_protocol.spans import Span
from tests.client.test_model import Pair
from tests.local_swarm import CLIENT_CONFIG

PROMPT = "5 17 31 8"
MESSAGES = [ChatMessage("user", "5 17 31")]


class Words:
    """A tokenizer of numbers: `5 17` is the text of tokens 5 and 17; a turn ends with 90, the answer begins with 91."""

    chat_template = "x"
    eos_token_id, eos_token = None, None

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, token_ids: list[int], **_: object) -> str:
        return "".join(f" {token_id}" for token_id in token_ids)

    def apply_chat_template(self, messages: list[dict[str, str]], **options: object) -> list[int]:
        ids = [token for message in messages for token in (*self.encode(message["content"]), 90)]
        if options.get("continue_final_message"):
            return ids[:-1]
        return [*ids, 91] if options.get("add_generation_prompt", True) else ids


class TurnWords(Words):
    """One whose template opens every turn of the assistant with 91."""

    def apply_chat_template(self, messages: list[dict[str, str]], **options: object) -> list[int]:
        marks = {"assistant": "91 ", "user": ""}
        marked = [{"content": marks[message["role"]] + message["content"]} for message in messages]
        return super().apply_chat_template(marked, **options)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair("llama", tmp_path_factory.mktemp("llama"))
    with pair.served:
        yield pair


@pytest.fixture
def model(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> DistributedTextModel:
    monkeypatch.setattr(type(pair.remote.checkpoint), "tokenizer", lambda _: Words())
    monkeypatch.setattr("swarm_client.generation.text_model._end_tokens", lambda *_: frozenset())
    return pair.remote.text_model()


@pytest.fixture(autouse=True)
def roomy_tapes(pair: Pair) -> None:
    pair.served.swarm._tapes.max_bytes = 1 << 20


@pytest.fixture
def session(model: DistributedTextModel) -> Iterator[DistributedTextSession]:
    session = model.open_session(120)
    yield session
    session.close()


def text_of(session: DistributedTextSession, num_tokens: int = 6, **params: Any) -> str:
    return "".join(delta.text for delta in session.generate(SamplingParams(num_tokens, **params)))


def local_text(pair: Pair, token_ids: list[int], num_tokens: int = 6) -> str:
    found = pair.local.generate(torch.tensor([token_ids]), max_new_tokens=num_tokens, do_sample=False)
    return Words().decode(found[0, len(token_ids) :].tolist())


def test_messages_set_again_give_the_same_answer_and_keep_what_agrees(
    pair: Pair, session: DistributedTextSession
) -> None:
    assert session.set_messages(MESSAGES) == 0
    assert session.set_messages(MESSAGES) == 0
    answer = text_of(session)
    assert answer == local_text(pair, [5, 17, 31, 90, 91])
    assert session.set_messages(MESSAGES) == 4  # all but the last one, whose logits are needed
    assert text_of(session) == answer
    other = [ChatMessage("user", "5 17"), ChatMessage("assistant", answer)]
    assert session.set_messages(other) == 2
    assert text_of(session) == local_text(pair, Words().apply_chat_template([{"content": m.content} for m in other]))


@pytest.mark.parametrize("params", [{}, {"do_sample": True, "temperature": 1.7, "top_k": 5, "seed": 3}], ids=str)
def test_logprobs_are_those_of_transformers_logits(
    pair: Pair, session: DistributedTextSession, params: dict[str, Any]
) -> None:
    session.append_text(PROMPT)
    deltas = list(session.generate(SamplingParams(6, logprobs=3, **params)))
    found = [logprobs for delta in deltas for logprobs in delta.logprobs]
    ids = list(session.token_ids)
    assert [logprobs.token_id for logprobs in found] == ids[4:]
    with torch.no_grad():
        wanted = pair.local(torch.tensor([ids])).logits[0].log_softmax(-1)[3:-1]
    for logprobs, row in zip(found, wanted, strict=True):
        assert logprobs.logprob == pytest.approx(float(row[logprobs.token_id]), abs=1e-4)
        best = row.topk(3)
        assert [token for token, _ in logprobs.top] == best.indices.tolist()
        assert [value for _, value in logprobs.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_what_is_cached_is_counted_at_the_first_step(session: DistributedTextSession) -> None:
    session.set_messages(MESSAGES)
    deltas = session.generate(SamplingParams(3))
    assert session.cached_tokens == 0
    assert sum(len(delta.token_ids) for delta in deltas) == 3
    assert session.cached_tokens == 0
    session.set_messages(MESSAGES)
    assert len(text_of(session).split()) == 6
    assert session.cached_tokens == 4


def test_texts_become_the_means_of_their_last_hidden_states(pair: Pair, model: DistributedTextModel) -> None:
    texts = [[5, 17, 31, 8], [9], [1, 2, 3, 4], [7, 7, 7]]
    found = model.embedder().embed(texts)
    for ids, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            states = pair.local.base_model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        assert torch.allclose(torch.tensor(vector), torch.nn.functional.normalize(states, dim=0), atol=1e-5)
    with pytest.raises(InvalidRequestError, match="without tokens"):
        model.embedder().embed([[1], []])
    with pytest.raises(MaxLengthError):
        model.embedder().embed([[1] * 100_000])
    assert model.embedder().embed([]) == []


def test_a_cancel_ends_an_embedding_that_hangs(pair: Pair, model: DistributedTextModel) -> None:
    embedder = model.embedder()
    pair.served.freeze(pair.served.nodes[1], is_frozen=True)
    timer = threading.Timer(0.2, embedder.cancel)
    timer.start()
    try:
        with pytest.raises(CancelledStepError):
            embedder.embed([[1, 2, 3]])
        with pytest.raises(CancelledStepError):
            embedder.embed([[1, 2, 3]])
    finally:
        timer.join()
        pair.served.freeze(pair.served.nodes[1], is_frozen=False)


def test_an_answer_is_continued_with_nothing_computed_twice(
    pair: Pair,
    model: DistributedTextModel,
    session: DistributedTextSession,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model, "_tokenizer", TurnWords())
    question = ChatMessage("user", "5 17")
    session.set_messages([question])
    first = text_of(session, 4)
    held = len(session.token_ids)
    kept = session.set_messages([question, ChatMessage("assistant", first)], continue_last=True)
    assert (kept, len(session.token_ids)) == (held - 1, held)  # the last one was never computed, only chosen
    assert first + text_of(session, 4) == local_text(pair, [5, 17, 90, 91], 8)


def test_a_rewind_keeps_the_tokens_of_the_first_messages(pair: Pair, session: DistributedTextSession) -> None:
    question = [ChatMessage("user", "5 17"), ChatMessage("assistant", "31"), ChatMessage("user", "8")]
    session.set_messages(question)
    text_of(session)
    assert session.keep_messages(question[:2]) == len(session.token_ids) == 5
    assert session.set_messages(question) == 5
    assert session.keep_messages([]) == 0


def test_a_tail_may_be_replaced_by_anything(pair: Pair, session: DistributedTextSession) -> None:
    session.append_text(PROMPT)
    answer = text_of(session)
    session.replace_tail(6, [])
    assert text_of(session) == answer
    session.replace_tail(8, [9, 9])
    assert text_of(session) == local_text(pair, [5, 17, 9, 9])
    session.replace_tail(1000, [])
    with pytest.raises(InvalidRequestError, match="empty"):
        session.generate(SamplingParams(1))
    with pytest.raises(MaxLengthError):
        session.replace_tail(0, [1] * 121)
    session.append_text(PROMPT)
    assert text_of(session) == answer


def test_an_answer_that_is_not_read_to_its_end_leaves_the_session_usable(
    pair: Pair, session: DistributedTextSession
) -> None:
    session.append_text(PROMPT)
    deltas = session.generate(SamplingParams(6))
    first = [next(deltas).text for _ in range(2)]
    deltas.close()  # type: ignore[attr-defined]
    assert len(session.token_ids) == 6
    assert "".join(first) + text_of(session, 4) == local_text(pair, [5, 17, 31, 8])


@pytest.mark.parametrize("num_before", range(4))
def test_a_seed_gives_one_text_whenever_it_is_cancelled(session: DistributedTextSession, num_before: int) -> None:
    params = {"do_sample": True, "temperature": 1.5, "seed": 7}
    session.append_text(PROMPT)
    whole = text_of(session, **params)
    session.replace_tail(6, [])
    deltas = session.generate(SamplingParams(6, **params))  # type: ignore[arg-type]
    shown = [delta.text for delta in itertools.islice(deltas, num_before)]
    session.cancel()
    rest = list(deltas)
    assert [(delta.text, delta.finish_reason) for delta in rest] == [("", "cancelled")]
    assert "".join(shown) + text_of(session, 6 - num_before, **params) == whole


def test_a_cancel_before_an_answer_is_over_when_the_next_begins(session: DistributedTextSession) -> None:
    session.cancel()
    session.append_text(PROMPT)
    assert len(text_of(session).split()) == 6


@pytest.mark.parametrize("is_open", [False, True], ids=["opening", "prefill"])
def test_a_cancel_ends_what_hangs(pair: Pair, session: DistributedTextSession, is_open: bool) -> None:
    session.append_text(PROMPT)
    if is_open:
        text_of(session, 1)
    pair.served.freeze(pair.served.nodes[1], is_frozen=True)
    timer = threading.Timer(0.2, session.cancel)
    timer.start()
    deltas = list(session.generate(SamplingParams(5)))
    timer.join()
    pair.served.freeze(pair.served.nodes[1], is_frozen=False)
    assert deltas[-1].finish_reason == "cancelled"
    assert len(session.token_ids) == 4 + is_open
    assert "".join(Words().decode(list(session.token_ids[4:]))) + text_of(session, 6 - is_open) == local_text(
        pair, [5, 17, 31, 8]
    )


@pytest.mark.parametrize(
    "params",
    [{"temperature": -1.0}, {"top_p": -0.5}, {"top_k": -2}, {"min_p": 7.0}],
    ids=lambda params: next(iter(params)),
)
def test_settings_that_make_no_sense_are_refused(session: DistributedTextSession, params: dict[str, Any]) -> None:
    session.append_text(PROMPT)
    with pytest.raises(InvalidRequestError):
        session.generate(SamplingParams(5, do_sample=True, **params))


def test_a_repetition_penalty_that_makes_no_sense_is_refused(session: DistributedTextSession) -> None:
    session.append_text(PROMPT)
    with pytest.raises(InvalidRequestError):
        session.generate(SamplingParams(5, repetition_penalty=-1.0))


def test_a_model_that_cannot_be_opened_leaves_the_swarm(
    tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LeftError(Exception):
        pass

    def leave(_: Swarm) -> None:
        raise LeftError

    monkeypatch.setattr(Swarm, "connect", lambda config: pair.served.swarm)
    monkeypatch.setattr(Swarm, "close", leave)
    pair.local.save_pretrained(tmp_path)  # there is no tokenizer in the folder
    with pytest.raises(LeftError):
        open_text_model(str(tmp_path), ["/ip4/127.0.0.1/tcp/1/p2p/x"], config=CLIENT_CONFIG)


@pytest.mark.parametrize("tape_bytes", [1 << 20, 0], ids=["from its tape", "from its tokens"])
def test_an_answer_goes_on_elsewhere_when_a_node_dies(
    pair: Pair, model: DistributedTextModel, session: DistributedTextSession, tape_bytes: int
) -> None:
    pair.served.swarm._tapes.max_bytes = tape_bytes
    session.append_text(PROMPT)
    deltas = session.generate(SamplingParams(6))
    shown = "".join(next(deltas).text for _ in range(2))
    pair.served.kill(pair.served.nodes[1])
    pair.served.nodes[1] = pair.served.add_node(Span(2, 5))
    assert shown + "".join(delta.text for delta in deltas) == local_text(pair, [5, 17, 31, 8])


def test_a_wait_is_told_to_the_thread_that_generates_and_the_text_is_the_same(
    pair: Pair, session: DistributedTextSession
) -> None:
    events: list[SessionEvent] = []

    def listen(event: SessionEvent) -> None:
        assert threading.current_thread() is threading.main_thread()
        events.append(event)
        if isinstance(event, Waiting) and event.cause == "missing_blocks":
            pair.served.nodes[1] = pair.served.add_node(Span(2, 5))

    session.append_text(PROMPT)
    deltas = session.generate(SamplingParams(6), listen)
    shown = "".join(next(deltas).text for _ in range(2))
    pair.served.kill(pair.served.nodes[1])
    assert shown + "".join(delta.text for delta in deltas) == local_text(pair, [5, 17, 31, 8])
    found = [getattr(event, "cause", event.kind) for event in events]
    assert [found[0], found[-2], found[-1]] == ["route_changed", "route_changed", "recovered"]
    assert {"looking", "missing_blocks"} <= set(found)
    times = session.times
    assert times.num_tokens == 6
    assert times.num_recoveries == 1
    assert times.recomputed_tokens == 5
    assert times.total.stall_s >= 1.0
    assert {hop.span for hop in times.hops} == {Span(0, 2), Span(2, 5)}


@pytest.mark.parametrize("tape_bytes", [1 << 20, 0], ids=["taped", "not taped"])
def test_a_wait_in_vain_names_what_is_missing_and_loses_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tape_bytes: int
) -> None:
    pair = Pair("llama", tmp_path, config=replace(CLIENT_CONFIG, max_wait_s=1.5, tape_bytes=tape_bytes))
    monkeypatch.setattr(type(pair.remote.checkpoint), "tokenizer", lambda _: Words())
    monkeypatch.setattr("swarm_client.generation.text_model._end_tokens", lambda *_: frozenset())
    with pair.served as served:
        session = pair.remote.text_model().open_session(120)
        session.append_text(PROMPT)
        events: list[SessionEvent] = []
        deltas = session.generate(SamplingParams(6), events.append)
        shown = "".join(next(deltas).text for _ in range(3))
        (served.kill if tape_bytes else served.stop)(served.nodes[1])
        with pytest.raises(MissingBlocksError, match="blocks 2–4"):
            next(deltas)
        assert any(isinstance(event, Waiting) and event.spans == (Span(2, 5),) for event in events)
        assert Words().decode(list(session.token_ids[4:])) == shown
        served.add_node(Span(2, 5))
        assert shown + text_of(session, 3) == local_text(pair, [5, 17, 31, 8])
        session.close()


def test_a_streams_times_are_those_of_its_tokens(
    pair: Pair, model: DistributedTextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(pair.remote), "text_model", lambda _: model)
    stream = pair.remote.stream(PROMPT, SamplingParams(6))
    assert stream.times.num_tokens == 0
    for _ in stream:
        time.sleep(0.05)  # the reader's own time does not count
    times = stream.times
    assert times.num_tokens == 6
    assert 0 < times.per_token.compute_s < times.per_token.total_s < 0.05
    assert times.total.stall_s == 0
    assert [hop.num_steps for hop in times.hops] == [6, 6]
    stream = pair.remote.stream(PROMPT, SamplingParams(6))
    next(stream)
    stream.close()
    assert (list(stream), stream.times.num_tokens) == ([], 1)


def test_a_generate_of_transformers_reports_its_times(pair: Pair) -> None:
    events: list[SessionEvent] = []
    with pair.remote.inference_session(max_length=40, on_event=events.append) as session:
        for num_tokens in (3, 5):
            pair.remote.generate(torch.tensor([[5, 17, 31]]), max_new_tokens=num_tokens, do_sample=False)
            assert session.times.num_tokens == num_tokens
        assert session.times.total.client_s > 0
    assert [event.kind for event in events] == ["route_changed"]
