"""The distributed model answers as transformers' own: families, generation modes, sessions, threads, failures."""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, StoppingCriteriaList

from swarm_client import AutoDistributedModelForCausalLM, DistributedCausalLM, SamplingParams
from swarm_client.generation.embedder import DistributedEmbedder
from swarm_protocol.errors import (
    CacheFullError,
    CancelledStepError,
    ConfigError,
    InvalidRequestError,
    MaxLengthError,
    MissingBlocksError,
    SessionClosedError,
)
from swarm_protocol.spans import Span
from tests.local_swarm import CLIENT_CONFIG, LocalSwarm
from tests.tiny_models import TINY_CONFIGS, save_tiny_model

PAD = 0


class Pair:
    """A tiny model in two spans on a swarm, and the same model whole."""

    def __init__(self, name: str, folder: Path, changes: Mapping[str, Any] | None = None, **served: Any) -> None:
        """`changes` are made to the model's configuration, `served` is how the swarm is set up."""
        self.local: PreTrainedModel = save_tiny_model(name, folder, **changes or {})
        self.local.generation_config.pad_token_id = PAD
        self.local.generation_config.eos_token_id = None
        num_blocks = self.local.config.get_text_config().num_hidden_layers
        self.served = LocalSwarm(folder, [Span(0, 2), Span(2, num_blocks)], **served)
        self.remote: DistributedCausalLM = AutoDistributedModelForCausalLM.from_pretrained(
            str(folder), swarm=self.served.swarm
        )
        self.remote.generation_config.pad_token_id = PAD
        self.remote.generation_config.eos_token_id = None

    def generated(self, ids: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        """The same call on both models, with the same random numbers."""
        results = []
        for model in (self.remote, self.local):
            torch.manual_seed(0)
            results.append(model.generate(ids, **options))
        return results[0], results[1]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair("llama", tmp_path_factory.mktemp("llama"))
    with pair.served:
        yield pair


@pytest.fixture(scope="module", params=sorted(TINY_CONFIGS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(request.param, tmp_path_factory.mktemp(request.param))
    with pair.served:
        yield pair


def ids(rows: int = 1, columns: int = 7, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 90, (rows, columns), generator=torch.Generator().manual_seed(seed))


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of 7, 4 and 7 tokens, padded on the left."""
    whole, mask = ids(3), torch.ones(3, 7, dtype=torch.long)
    whole[1, :3], mask[1, :3] = PAD, 0
    return whole, mask


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 1e-5 * wanted.abs().max())


# Every family: what depends on how its forward calls the blocks.


@torch.no_grad()
def test_logits_equal_the_whole_models(pair: Pair) -> None:
    tokens = ids(2)
    assert close(pair.remote(tokens).logits, pair.local(tokens).logits)


@torch.no_grad()
def test_embeddings_are_means_of_what_the_head_is_given(pair: Pair) -> None:
    rows = ids(2).tolist()
    states = pair.local.base_model(torch.tensor(rows)).last_hidden_state.mean(1)
    wanted = torch.nn.functional.normalize(states, dim=-1)
    found = DistributedEmbedder(pair.remote.ends, pair.remote.remote_blocks.session, 50).embed(rows)
    assert close(torch.tensor(found), wanted)


def test_greedy_text_equals_the_whole_models(pair: Pair) -> None:
    found, wanted = pair.generated(ids(2), max_new_tokens=6, do_sample=False)
    assert torch.equal(found, wanted)


def test_left_padded_batches_equal_the_whole_models(pair: Pair) -> None:
    tokens, mask = padded()
    found, wanted = pair.generated(tokens, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(found, wanted)


def test_beam_search_equals_the_whole_models(pair: Pair) -> None:
    found, wanted = pair.generated(ids(2), max_new_tokens=5, num_beams=3, do_sample=False)
    assert torch.equal(found, wanted)


# One family: what is the same for all.


def test_sampling_draws_the_same_tokens(llama: Pair) -> None:
    found, wanted = llama.generated(
        ids(2), max_new_tokens=12, do_sample=True, temperature=0.9, top_k=30, top_p=0.9, repetition_penalty=1.2
    )
    assert torch.equal(found, wanted)


def test_padded_beams_equal_the_whole_models(llama: Pair) -> None:
    tokens, mask = padded()
    found, wanted = llama.generated(tokens, attention_mask=mask, max_new_tokens=6, num_beams=2, do_sample=False)
    assert torch.equal(found, wanted)


@torch.no_grad()
def test_padded_logits_equal_the_whole_models(llama: Pair) -> None:
    tokens, mask = padded()
    found = llama.remote(tokens, attention_mask=mask).logits
    wanted = llama.local(tokens, attention_mask=mask).logits
    assert close(found[mask.bool()], wanted[mask.bool()])


def test_calls_in_one_session_go_on_without_computing_anything_again(llama: Pair) -> None:
    first, second = ids(), ids(columns=3, seed=2)
    with llama.remote.inference_session(max_length=40) as session:
        a = llama.remote.generate(first, max_new_tokens=4, do_sample=False)
        assert session.position == first.shape[1] + 3
        b = llama.remote.generate(second, max_new_tokens=4, do_sample=False)
        assert session.position == first.shape[1] + 4 + second.shape[1] + 3
        c = llama.remote.generate(max_new_tokens=4, do_sample=False)
    assert (a.shape[1], b.shape[1], c.shape[1]) == (11, 7, 4)
    assert torch.equal(a, llama.local.generate(first, max_new_tokens=4, do_sample=False))
    assert torch.equal(torch.cat([a, b], 1), llama.local.generate(torch.cat([a, second], 1), max_new_tokens=4))
    assert torch.equal(torch.cat([a, b, c], 1), llama.local.generate(torch.cat([a, b], 1), max_new_tokens=4))


def test_a_session_is_passed_by_argument_too(llama: Pair) -> None:
    session = llama.remote.inference_session(max_length=20)
    a = llama.remote.generate(ids(), max_new_tokens=2, do_sample=False, session=session)
    b = llama.remote.generate(max_new_tokens=2, do_sample=False, session=session)
    session.close()
    assert torch.equal(torch.cat([a, b], 1), llama.local.generate(ids(), max_new_tokens=4, do_sample=False))


def test_a_padded_batch_goes_on_in_its_session(llama: Pair) -> None:
    tokens, mask = padded()
    with llama.remote.inference_session(max_length=40):
        a = llama.remote.generate(tokens, attention_mask=mask, max_new_tokens=3, do_sample=False)
        b = llama.remote.generate(max_new_tokens=3, do_sample=False)
    wanted = llama.local.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(torch.cat([a, b], 1), wanted)


def test_beam_search_in_a_session_can_be_followed_by_greedy(llama: Pair) -> None:
    with llama.remote.inference_session(max_length=40):
        a = llama.remote.generate(ids(), max_new_tokens=3, num_beams=2, do_sample=False)
        b = llama.remote.generate(max_new_tokens=3, do_sample=False)
    wanted = llama.local.generate(ids(), max_new_tokens=3, num_beams=2, do_sample=False)
    assert torch.equal(a, wanted)
    assert torch.equal(torch.cat([a, b], 1), llama.local.generate(wanted, max_new_tokens=3, do_sample=False))


@torch.no_grad()
def test_forwards_in_a_session_bring_only_new_tokens(llama: Pair) -> None:
    tokens = ids(columns=9)
    wanted = llama.local(tokens).logits
    with llama.remote.inference_session(max_length=40) as session:
        first = llama.remote(tokens[:, :5]).logits
        second = llama.remote(tokens[:, 5:8]).logits
        session.position = 5
        third = llama.remote(tokens[:, 5:]).logits
    assert close(first, wanted[:, :5])
    assert close(second, wanted[:, 5:8])
    assert close(third, wanted[:, 5:])


@torch.no_grad()
def test_steps_give_hidden_states_and_roll_back(llama: Pair) -> None:
    states = llama.remote.ends.embed(ids(columns=8))
    with llama.remote.inference_session(max_length=40) as session:
        whole = session.step(states)
        session.position = 3
        again = session.step(states[:, 3:5])
        assert session.position == 5
    assert close(again, whole[:, 3:5])
    with pytest.raises(SessionClosedError):
        session.step(states)


@torch.no_grad()
def test_hidden_states_after_every_span_come_on_request(llama: Pair) -> None:
    tokens = ids(2)
    wanted = llama.local(tokens, output_hidden_states=True).hidden_states
    for found in (llama.remote(tokens, output_hidden_states=True).hidden_states, states_in_session(llama, tokens)):
        assert len(found) == 3
        assert close(found[0], wanted[0])
        assert close(found[1], wanted[2])


def states_in_session(llama: Pair, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with llama.remote.inference_session(max_length=40):
        return tuple(llama.remote(tokens, output_hidden_states=True).hidden_states)


def test_threads_with_a_session_each_do_not_disturb_each_other(llama: Pair) -> None:
    prompts = [ids(columns=4 + n, seed=n) for n in range(6)]
    found: dict[int, torch.Tensor] = {}

    def talk(n: int) -> None:
        with llama.remote.inference_session(max_length=60):
            parts = [llama.remote.generate(prompts[n], max_new_tokens=5, do_sample=False)]
            parts += [llama.remote.generate(max_new_tokens=5, do_sample=False) for _ in range(3)]
            found[n] = torch.cat(parts, 1)

    threads = [threading.Thread(target=talk, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, prompt in enumerate(prompts):
        assert torch.equal(found[n], llama.local.generate(prompt, max_new_tokens=20, do_sample=False))


def test_a_long_prompt_is_sent_in_pieces(llama: Pair) -> None:
    found, wanted = llama.generated(ids(3, 400), max_new_tokens=2, do_sample=False)
    assert torch.equal(found, wanted)


def test_scores_come_with_a_dictionary(llama: Pair) -> None:
    found, wanted = llama.generated(
        ids(), max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(found.sequences, wanted.sequences)
    assert all(close(a, b) for a, b in zip(found.scores, wanted.scores, strict=True))


@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
def test_ends_and_states_have_the_dtype_asked_for(llama: Pair, keyword: str, tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    model = AutoDistributedModelForCausalLM.from_pretrained(
        str(tmp_path), swarm=llama.served.swarm, **{keyword: torch.bfloat16}
    )
    assert model.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="int8"):
        AutoDistributedModelForCausalLM.from_pretrained(str(tmp_path), swarm=llama.served.swarm, dtype=torch.int8)


# What goes wrong.


def test_a_session_that_gets_too_long_says_so_and_stays_usable(llama: Pair) -> None:
    with llama.remote.inference_session(max_length=10) as session:
        with pytest.raises(MaxLengthError, match=r"Maximum length exceeded: prefix 10 \+ current 1 exceeds"):
            llama.remote.generate(ids(), max_new_tokens=8, do_sample=False)
        assert session.position == 0
        assert llama.remote.generate(ids(), max_new_tokens=2, do_sample=False).shape == (1, 9)


def test_more_than_the_nodes_can_hold_is_refused(tmp_path: Path) -> None:
    # A swarm of its own: it computes until the cache is full, and waits for another.
    pair = Pair("llama", tmp_path, cache_tokens=300, config=replace(CLIENT_CONFIG, max_wait_s=0.5))
    with pair.served, pytest.raises(CacheFullError, match="attention cache is full"):
        pair.remote.generate(ids(), max_new_tokens=100_000)


@pytest.mark.parametrize("mask", [[[1, 0, 1, 1, 1, 1, 1]], [[0, 1, 0, 1, 1, 0, 0]], [[0] * 7]])
@torch.no_grad()
def test_masks_with_holes_are_refused(llama: Pair, mask: list[list[int]]) -> None:
    with pytest.raises(InvalidRequestError, match="padding"):
        llama.remote(ids(), attention_mask=torch.tensor(mask))


@torch.no_grad()
def test_padding_behind_changes_nothing_before_it_and_has_no_place_in_a_session(llama: Pair) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 0]])
    found = llama.remote(ids(2), attention_mask=mask).logits
    wanted = llama.local(ids(2), attention_mask=mask).logits
    assert close(found[0, :5], wanted[0, :5])
    assert close(found[1, 1:6], wanted[1, 1:6])
    with llama.remote.inference_session(max_length=20), pytest.raises(InvalidRequestError, match="padding"):
        llama.remote(ids(2), attention_mask=mask)


def test_rows_may_not_change_in_a_session(llama: Pair) -> None:
    with llama.remote.inference_session(max_length=20) as session:
        session.step(torch.zeros(1, 1, llama.local.config.hidden_size))
        with pytest.raises(InvalidRequestError, match="1 rows, this step has 2"):
            session.step(torch.zeros(2, 1, llama.local.config.hidden_size))


def test_without_a_peer_to_start_from_there_is_no_model(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    with pytest.raises(ConfigError, match="initial_peers"):
        AutoDistributedModelForCausalLM.from_pretrained(str(tmp_path))


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[LocalSwarm, DistributedCausalLM, PreTrainedModel]]:
    local = save_tiny_model("llama", tmp_path)
    with LocalSwarm(tmp_path, [Span(0, 2), Span(2, 5)], config=replace(CLIENT_CONFIG, max_wait_s=2.0)) as served:
        yield served, AutoDistributedModelForCausalLM.from_pretrained(str(tmp_path), swarm=served.swarm), local


Two = tuple[LocalSwarm, DistributedCausalLM, PreTrainedModel]


def test_blocks_that_nobody_serves_are_named(two: Two) -> None:
    served, model, _ = two
    served.stop(served.nodes[1])
    with pytest.raises(MissingBlocksError, match="blocks 2–4"):
        model.generate(ids(), max_new_tokens=2)
    served.add_node(Span(2, 5))
    assert model.generate(ids(), max_new_tokens=2).shape == (1, 9)


def test_a_session_goes_on_when_a_node_dies_and_another_has_its_blocks(two: Two) -> None:
    served, model, local = two
    session = model.inference_session(max_length=40)
    first = model.generate(ids(), max_new_tokens=2, do_sample=False, session=session)
    served.add_node(Span(1, 5))
    served.kill(served.nodes[1])
    rest = model.generate(max_new_tokens=2, do_sample=False, session=session)
    session.close()
    assert torch.equal(torch.cat([first, rest], 1), local.generate(ids(), max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("standby", [False, True])
def test_beams_go_on_when_a_node_dies(two: Two, standby: bool) -> None:
    served, model, local = two
    served.add_node(Span(2, 5))
    deaths = [served.nodes[1]]

    def kill(*_: object) -> torch.Tensor:
        if session.position > 9 and deaths:
            served.kill(deaths.pop())
        return torch.zeros(1, dtype=torch.bool)

    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    with model.inference_session(max_length=40, standby=standby) as session:
        found = model.generate(ids(), stopping_criteria=StoppingCriteriaList([kill]), **options)
    assert not deaths
    assert torch.equal(found, local.generate(ids(), **options))


@pytest.mark.parametrize("after_frames", [0, 1, 2, 3])
@pytest.mark.parametrize("node", [0, 1])
def test_a_dropped_stream_is_taken_up_again_unnoticed(two: Two, node: int, after_frames: int) -> None:
    served, model, local = two
    with model.inference_session(max_length=40):
        parts = [model.generate(ids(), max_new_tokens=2, do_sample=False)]
        served.break_streams(served.nodes[node], after_frames)
        parts += [model.generate(max_new_tokens=3, do_sample=False) for _ in range(2)]
    wanted = local.generate(ids(), max_new_tokens=8, do_sample=False)
    assert torch.equal(torch.cat(parts, 1), wanted)


@pytest.mark.parametrize("node", [0, 1])
def test_a_cancelled_step_ends_at_once_and_leaves_the_session_usable(two: Two, node: int) -> None:
    served, model, _ = two
    states = model.ends.embed(ids(columns=9))
    with model.inference_session(max_length=400) as session:
        session.step(states[:, :4])
        served.freeze(served.nodes[node], is_frozen=True)
        timer = threading.Timer(0.1, session.cancel)
        timer.start()
        with pytest.raises(CancelledStepError):
            session.step(states[:, 4:6])
        timer.join()
        served.freeze(served.nodes[node], is_frozen=False)
        assert session.position == 4
        output = session.step(states[:, 4:])
    assert close(output, whole_output(model, states)[:, 4:])


@torch.no_grad()
def whole_output(model: DistributedCausalLM, states: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = model.remote_blocks(states)
    return output


def test_sessions_free_their_memory_at_the_nodes(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    with LocalSwarm(tmp_path, [Span(0, 2), Span(2, 5)], cache_tokens=160) as served:
        model = AutoDistributedModelForCausalLM.from_pretrained(str(tmp_path), swarm=served.swarm)
        for _ in range(3):
            with model.inference_session(max_length=50):
                model.generate(ids(3), max_new_tokens=2)
                with pytest.raises(CacheFullError), model.inference_session(max_length=50):
                    model.generate(ids(3), max_new_tokens=2)


def test_stream_gives_text(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, local = two

    class Words:
        """A tokenizer of numbers: `5 17` is the text of tokens 5 and 17."""

        chat_template = "x"
        eos_token_id, eos_token = None, None

        def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
            return [int(word) for word in text.split()]

        def decode(self, token_ids: list[int], **_: object) -> str:
            return "".join(f" {token_id}" for token_id in token_ids)

    monkeypatch.setattr(type(model.checkpoint), "tokenizer", lambda _: Words())
    prompt = ids()
    wanted = local.generate(prompt, max_new_tokens=6, do_sample=False)[0, 7:].tolist()
    deltas = list(model.stream(" ".join(map(str, prompt[0].tolist())), SamplingParams(6)))
    assert "".join(delta.text for delta in deltas) == "".join(f" {token}" for token in wanted)
    assert deltas[-1].finish_reason == "length"
    stopped = list(model.stream(" ".join(map(str, prompt[0].tolist())), SamplingParams(6, stop=(f" {wanted[3]}",))))
    assert stopped[-1].finish_reason == "stop"
