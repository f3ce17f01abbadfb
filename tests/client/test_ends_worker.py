"""The ends worker: tokens of many sessions in one batch, each as if it were alone."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch

from swarm_client.generation import ends_worker
from swarm_client.generation.ends_worker import EndsRow, EndsWorker
from swarm_client.generation.sampling import TokenChooser
from swarm_client.generation.text_session import SamplingParams
from swarm_protocol.errors import MaxLengthError, SessionClosedError
from swarm_protocol.model.parts import EndsModule
from tests.client.test_model import Pair
from tests.client.test_text_sessions import Words

SETTINGS: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "temperature": 1.3},
    {"do_sample": True, "temperature": 1.3, "top_k": 20},
    {"repetition_penalty": 1.4},
    {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2},
    {"do_sample": True, "temperature": 1.3},
    {"do_sample": True, "min_p": 0.05},
    {},
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair("opt", tmp_path_factory.mktemp("opt"))
    with pair.served:
        yield pair


@pytest.fixture
def ends(pair: Pair) -> EndsModule:
    return pair.remote.ends


@pytest.fixture
def worker() -> Iterator[EndsWorker]:
    worker = EndsWorker()
    yield worker
    worker.close()


@pytest.fixture
def text_model(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(type(pair.remote.checkpoint), "tokenizer", lambda _: Words())
    monkeypatch.setattr("swarm_client.generation.text_model._end_tokens", lambda *_: frozenset())
    return pair.remote.text_model()


class Gate:
    """Lets the head compute only when it is open; `sizes` are the rows of each of its batches."""

    def __init__(self, ends: EndsModule, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.is_open = threading.Event()
        self.entered = threading.Event()
        original = ends.logits

        def logits(hidden_states: torch.Tensor) -> torch.Tensor:
            self.sizes.append(hidden_states.shape[0])
            self.entered.set()
            assert self.is_open.wait(10)
            return original(hidden_states)

        monkeypatch.setattr(ends, "logits", logits)


@pytest.fixture
def gate(ends: EndsModule, monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(ends, monkeypatch)


def row(ends: EndsModule, seed: int = 0, **params: Any) -> EndsRow:
    states = torch.randn(1, 1, ends.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    return EndsRow(ends, TokenChooser(SamplingParams(1, seed=seed, **params)), states, [3, 5, 8 + seed])


def test_rows_that_wait_are_one_batch_with_the_tokens_of_single_ones(
    ends: EndsModule, worker: EndsWorker, gate: Gate
) -> None:
    rows = [row(ends, seed, **params) for seed, params in enumerate(SETTINGS)]
    gate.is_open.set()
    alone = [worker.submit(each).result(10) for each in rows]
    gate.is_open.clear()
    gate.entered.clear()
    gate.sizes.clear()
    first = worker.submit(rows[0])
    assert gate.entered.wait(10)
    rest = [worker.submit(each) for each in rows[1:]]
    gate.is_open.set()
    together = [future.result(10) for future in [first, *rest]]
    assert gate.sizes == [1, 7]
    assert [chosen.token_id for chosen in together] == [chosen.token_id for chosen in alone]
    for chosen, at in zip(together, rows, strict=True):
        assert chosen.embedded is not None
        wanted = ends.embed(torch.tensor([[chosen.token_id]]), len(at.token_ids))
        torch.testing.assert_close(chosen.embedded, wanted, atol=1e-6, rtol=1e-6)


def test_a_row_that_fails_fails_alone(ends: EndsModule, worker: EndsWorker, gate: Gate) -> None:
    bad = EndsRow(ends, TokenChooser(SamplingParams(1)), torch.zeros(1, 1, 5), [1])
    first = worker.submit(row(ends))
    assert gate.entered.wait(10)
    futures = [worker.submit(each) for each in (row(ends, 1), bad, row(ends, 2))]
    gate.is_open.set()
    assert first.result(10)
    assert futures[0].result(10).token_id == worker.submit(row(ends, 1)).result(10).token_id
    with pytest.raises(RuntimeError):
        futures[1].result(10)
    assert futures[2].result(10)


def test_a_token_at_the_end_of_the_positions_is_not_embedded_and_harms_nobody(
    ends: EndsModule, worker: EndsWorker
) -> None:
    limit = ends.config.max_position_embeddings
    full = EndsRow(ends, TokenChooser(SamplingParams(1)), row(ends).hidden_states, [4] * limit)
    assert worker.submit(full).result(10).embedded is None
    with pytest.raises(MaxLengthError):
        ends.embed(torch.tensor([[4]]), limit)
    last = EndsRow(ends, full.chooser, full.hidden_states, [4, 5], is_last=True)
    assert worker.submit(last).result(10).embedded is None


def test_a_row_that_is_taken_back_is_not_computed(ends: EndsModule, worker: EndsWorker, gate: Gate) -> None:
    first = worker.submit(row(ends))
    assert gate.entered.wait(10)
    second, third = worker.submit(row(ends, 1)), worker.submit(row(ends, 2))
    assert second.cancel()
    with pytest.raises(CancelledError):
        second.result(10)
    gate.is_open.set()
    assert first.result(10)
    assert third.result(10)
    assert gate.sizes == [1, 1]


def test_closing_lets_nobody_wait(ends: EndsModule, worker: EndsWorker, gate: Gate) -> None:
    first = worker.submit(row(ends))
    assert gate.entered.wait(10)
    second = worker.submit(row(ends, 1))
    closing = threading.Thread(target=worker.close)
    closing.start()
    with pytest.raises(CancelledError):
        second.result(10)
    gate.is_open.set()
    closing.join(10)
    assert first.result(10)
    with pytest.raises(SessionClosedError):
        worker.submit(row(ends))


def test_a_bug_of_the_thread_reaches_those_who_wait(
    ends: EndsModule, worker: EndsWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(ends_worker, "run_rows", None)
        with pytest.raises(TypeError):
            worker.submit(row(ends)).result(10)
    assert worker.submit(row(ends)).result(10)


def test_an_idle_thread_ends_and_another_begins(ends: EndsModule) -> None:
    worker = EndsWorker(idle_s=0.02)
    for _ in range(2):
        assert worker.submit(row(ends)).result(10)
        thread = worker._thread
        assert thread is not None
        thread.join(10)
        assert not thread.is_alive()
        assert worker._thread is None


def text_of(text_model: Any, prompt: str, **params: Any) -> str:
    session = text_model.open_session(100)
    try:
        session.append_text(prompt)
        return "".join(delta.text for delta in session.generate(SamplingParams(12, seed=7, **params)))
    finally:
        session.close()


def test_sessions_in_company_get_the_texts_that_they_get_alone(text_model: Any, gate: Gate) -> None:
    gate.is_open.set()
    prompts = [" ".join(str(1 + (7 * number + at) % 80) for at in range(2 + number)) for number in range(8)]
    jobs = list(zip(prompts, SETTINGS, strict=True))
    alone = [text_of(text_model, prompt, **params) for prompt, params in jobs]
    gate.sizes.clear()
    found = [""] * len(jobs)

    def run(number: int) -> None:
        found[number] = text_of(text_model, jobs[number][0], **jobs[number][1])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == alone
    assert sum(gate.sizes) == 8 * 12
    assert len(gate.sizes) < 60


def test_a_session_is_cancelled_while_its_row_waits(text_model: Any, ends: EndsModule, gate: Gate) -> None:
    gate.is_open.set()
    wanted = text_of(text_model, "5 17 31")
    gate.is_open.clear()
    gate.entered.clear()
    blocking = ends_worker.ENDS_WORKER.submit(row(ends))
    assert gate.entered.wait(10)
    session = text_model.open_session(100)
    session.append_text("5 17 31")
    deltas: list[Any] = []
    thread = threading.Thread(target=lambda: deltas.extend(session.generate(SamplingParams(12))))
    thread.start()
    deadline_s = time.monotonic() + 10
    while session._choosing is None and time.monotonic() < deadline_s:
        time.sleep(0.005)
    session.cancel()
    thread.join(10)
    assert not thread.is_alive()
    assert [delta.finish_reason for delta in deltas] == ["cancelled"]
    gate.is_open.set()
    assert blocking.result(10)
    assert "".join(delta.text for delta in session.generate(SamplingParams(12))) == wanted
    session.close()
