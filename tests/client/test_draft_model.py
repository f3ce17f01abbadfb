"""A draft model follows a text through rewinds and long prompts, and changes no token of it."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from swarm_client import SamplingParams
from swarm_client.generation.draft_model import CACHES_MOST, WAIT_TOKENS, DraftModel, DraftSession, load_draft_model
from swarm_client.generation.sampling import TokenChooser
from swarm_client.generation.speculation import FIRST_LENGTH
from swarm_client.generation.text_model import DistributedTextModel
from swarm_client.swarm import Swarm
from swarm_protocol.errors import ConfigError
from swarm_protocol.model import Checkpoint
from tests.client.test_model import Pair
from tests.client.test_text_sessions import Words
from tests.tiny_models import tiny_model

GREEDY = TokenChooser(SamplingParams(1))
SAMPLED = {"do_sample": True, "temperature": 1.1, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 3}


class CountedWords(Words):
    """A tokenizer that has a vocabulary, too."""

    def __init__(self, size: int = 100) -> None:
        self._size = size

    def get_vocab(self) -> dict[str, int]:
        return {str(token_id): token_id for token_id in range(self._size)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[Pair]:
    pair = Pair("llama", folder)
    with pair.served:
        yield pair


@pytest.fixture(autouse=True)
def tokenizer(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(pair.remote.checkpoint), "tokenizer", lambda _: CountedWords())
    monkeypatch.setattr("swarm_client.generation.text_model._end_tokens", lambda *_: frozenset())


@pytest.fixture
def drafts(pair: Pair, folder: Path) -> DraftModel:
    """The distributed model itself."""
    return load_draft_model(str(folder), "none", pair.remote.checkpoint)


def wait_until_ready(session: DraftSession, token_ids: list[int]) -> None:
    deadline_s = time.monotonic() + 20
    while not session.is_ready(token_ids):
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def text_model(pair: Pair, source: str | None, monkeypatch: pytest.MonkeyPatch) -> DistributedTextModel:
    swarm: Swarm = pair.served.swarm
    config = replace(swarm.config, speculation="draft", draft_model=source, draft_quantization="none")
    monkeypatch.setattr(swarm, "config", config)
    return DistributedTextModel(pair.remote.checkpoint, pair.remote.ends, pair.remote.remote_blocks)


def guess_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the draft model alone, whatever steps and drafts take."""
    monkeypatch.setattr("swarm_client.generation.speculation.PromptLookup.draft", lambda *_: ())
    monkeypatch.setattr(
        "swarm_client.generation.speculation.StepTimes.gain", lambda _, right, length, token_s: 1 + length
    )


def ids_of(model: DistributedTextModel, prompt: str, speculation: str | None, **params: Any) -> tuple[list[int], Any]:
    session = model.open_session(120, speculation=speculation)
    session.append_text(prompt)
    list(session.generate(SamplingParams(60, **params)))
    session.close()
    return list(session.token_ids), session.times


@pytest.mark.parametrize("params", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_the_model_itself_guesses_everything_right(
    pair: Pair, folder: Path, monkeypatch: pytest.MonkeyPatch, params: dict[str, Any]
) -> None:
    model = text_model(pair, str(folder), monkeypatch)
    guess_always(monkeypatch)
    wanted, _ = ids_of(model, "5 17 31 8", "off", **params)
    found, times = ids_of(model, "5 17 31 8", None, **params)
    assert found == wanted
    assert times.drafted_tokens > 30
    assert times.accepted_tokens == times.drafted_tokens


@pytest.mark.parametrize("params", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_another_model_changes_no_token(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, params: dict[str, Any]
) -> None:
    draft = tiny_model("llama")
    torch.manual_seed(77)
    torch.nn.init.normal_(draft.get_input_embeddings().weight, std=0.5)
    draft.save_pretrained(tmp_path)
    model = text_model(pair, str(tmp_path), monkeypatch)
    guess_always(monkeypatch)
    wanted, _ = ids_of(model, "5 17 31 8", "off", **params)
    found, times = ids_of(model, "5 17 31 8", None, **params)
    assert found == wanted
    assert times.drafted_tokens > times.accepted_tokens


def test_drafts_are_the_same_after_rewinds(drafts: DraftModel) -> None:
    session = drafts.session()
    texts = [[5, 17, 31, 8], [5, 17, 31, 8, 9, 9, 9], [5, 17, 31], [5, 17, 4, 4, 4, 4], [7], [5, 17, 31, 8]]
    for text in texts:
        fresh = drafts.session()
        assert session.draft(text, 5, GREEDY) == fresh.draft(text, 5, GREEDY)
        fresh.close()
    session.close()


def test_a_long_prompt_is_caught_up_with_in_the_background(drafts: DraftModel) -> None:
    prompt = torch.randint(0, 90, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    session, fresh = drafts.session(), drafts.session()
    assert not session.is_ready(prompt)
    wait_until_ready(session, prompt)
    assert session.is_ready([*prompt, *range(WAIT_TOKENS - 1)])
    assert session.draft(prompt, 4, GREEDY) == fresh.draft(prompt, 4, GREEDY)
    session.close()
    fresh.close()


def test_few_caches_are_kept(drafts: DraftModel) -> None:
    sessions = [drafts.session() for _ in range(CACHES_MOST + 2)]
    found = [session.draft([1, 2, 3], 3, GREEDY) for session in sessions]
    drafts._thread.submit(lambda: None).result()
    assert [bool(session._ids) for session in sessions] == [False] * 2 + [True] * CACHES_MOST
    assert sessions[0].draft([1, 2, 3], 3, GREEDY) == found[0]  # made again
    for session in sessions:
        session.close()
    drafts._thread.submit(lambda: None).result()
    assert not any(session._ids for session in sessions)
    assert drafts._recent == []


def test_nothing_is_guessed_beyond_what_the_draft_model_can_hold(drafts: DraftModel) -> None:
    session = drafts.session()
    text = [1] * (drafts.max_length - 2)
    wait_until_ready(session, text)
    assert len(session.draft(text, 8, GREEDY)) == 2
    assert not session.is_ready([*text, 1, 1])
    session.close()


def test_a_draft_model_that_fails_is_done_without(
    pair: Pair, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = text_model(pair, str(folder), monkeypatch)
    guess_always(monkeypatch)
    wanted, _ = ids_of(model, "5 17 31 8", "off")

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.draft_model(), "run", fail)
    found, times = ids_of(model, "5 17 31 8", None)
    assert found == wanted
    assert times.drafted_tokens <= FIRST_LENGTH
    assert "goes on without it" in caplog.text


def test_what_does_not_fit_is_refused(pair: Pair, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="needs ClientConfig"):
        text_model(pair, None, monkeypatch).open_session(50)
    with pytest.raises(ConfigError, match="none of none, int8, nf4"):
        load_draft_model(str(folder), "int2", pair.remote.checkpoint)
    other = cast(Checkpoint, SimpleNamespace(name="big", tokenizer=lambda: CountedWords(99)))
    with pytest.raises(ConfigError, match="has other tokens"):
        load_draft_model(str(folder), "none", other)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_packed_layers_guess_nearly_as_well(
    pair: Pair, folder: Path, drafts: DraftModel, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    monkeypatch.setattr("swarm_protocol.model.quantized_linears._MIN_WEIGHTS", 1)
    packed = load_draft_model(str(folder), quantization, pair.remote.checkpoint)
    assert packed._blocks.dtype == torch.bfloat16
    assert {str(buffer.dtype) for buffer in packed._blocks.parameters()} != {"torch.float32"}
    same = 0
    for first in range(40):
        text = [first, 17, 31]
        same += packed.session().draft(text, 1, GREEDY) == drafts.session().draft(text, 1, GREEDY)
    assert same >= 20  # of 90 tokens; random ones would be the same in none or one case


def test_a_site_whose_draft_model_does_not_fit_looks_up(
    pair: Pair, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = text_model(pair, str(folder), monkeypatch)
    other = cast(Checkpoint, SimpleNamespace(name="big", tokenizer=lambda: CountedWords(99)))
    monkeypatch.setattr(model, "_checkpoint", other)
    with pytest.raises(ConfigError, match="has other tokens"):
        model.open_session(50)
    model.prepare()
    assert "has other tokens than big" in caplog.text
    session = model.open_session(50)
    assert session._drafter is None
    session.close()
