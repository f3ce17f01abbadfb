"""Sessions reserve little and grow by themselves; prompts that begin alike are computed once."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from server_node.admission import Admission
from server_node.compute.block_runner import BlockRunner
from server_node.node import Node
from swarm_client import SamplingParams
from swarm_client.generation.text_model import DistributedTextModel
from swarm_client.reservation import tokens_to_reserve
from swarm_protocol.errors import CacheFullError
from swarm_protocol.messages import PAGE_TOKENS
from tests.client.test_model import Pair
from tests.client.test_text_sessions import Words, local_text
from tests.local_swarm import CLIENT_CONFIG

CACHE_TOKENS = 1024


ledgers: list[Admission] = []
"""Those of the nodes that run."""


class WatchedNode(Node):
    """A node whose ledger can be looked at."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        ledgers.append(self.admission)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server_node.life.Node", WatchedNode)
        folder, changes = tmp_path_factory.mktemp("llama"), {"max_position_embeddings": 2048}
        pair = Pair("llama", folder, changes, cache_tokens=CACHE_TOKENS, prefix_tokens=1024)
    with pair.served:
        yield pair
    ledgers.clear()


@pytest.fixture
def model(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> DistributedTextModel:
    monkeypatch.setattr(type(pair.remote.checkpoint), "tokenizer", lambda _: Words())
    monkeypatch.setattr("swarm_client.generation.text_model._end_tokens", lambda *_: frozenset())
    return pair.remote.text_model()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every forward of a node."""
    counts: list[int] = []
    original = BlockRunner.run_begun

    def run_begun(self: BlockRunner, cache: Any, hidden_states: torch.Tensor, blocks: Any) -> torch.Tensor:
        counts.append(hidden_states.shape[1])
        return original(self, cache, hidden_states, blocks)

    monkeypatch.setattr(BlockRunner, "run_begun", run_begun)
    return counts


def answer(model: DistributedTextModel, prompt: list[int], num_tokens: int = 4) -> str:
    session = model.open_session(2048)
    try:
        session.append_text(Words().decode(prompt))
        return "".join(delta.text for delta in session.generate(SamplingParams(num_tokens)))
    finally:
        session.close()


def reserved() -> set[int]:
    """The tokens that are reserved at the nodes."""
    return {CACHE_TOKENS - ledger.free_tokens for ledger in ledgers}


@pytest.mark.parametrize(
    ("num_tokens", "ahead", "max_length", "reservation"),
    [
        (1, 256, 8192, 320),
        (1, 0, 8192, 64),
        (64, 0, 8192, 128),
        (3, 256, 20, 20),
        (4000, 256, 8192, 5056),
        (8192, 256, 8192, 8192),
    ],
)
def test_a_reservation_is_some_pages_ahead(num_tokens: int, ahead: int, max_length: int, reservation: int) -> None:
    assert tokens_to_reserve(num_tokens, ahead, max_length) == reservation


def test_a_session_takes_what_it_needs_and_grows(pair: Pair) -> None:
    with pair.remote.inference_session(max_length=1000) as session:
        session.step(torch.zeros(1, 10, 32))
        assert reserved() == {320}
        session.step(torch.zeros(1, 310, 32))
        assert reserved() == {320}
        session.step(torch.zeros(1, 1, 32))
        assert reserved() == {640}
    assert reserved() == {0}


def test_where_little_is_left_a_session_takes_just_what_it_needs(pair: Pair) -> None:
    with (
        pair.remote.inference_session(max_length=1000) as first,
        pair.remote.inference_session(max_length=700) as other,
    ):
        first.step(torch.zeros(1, 320, 32))
        other.step(torch.zeros(1, 300, 32))
        assert reserved() == {576 + 300}
        other.step(torch.zeros(1, 20, 32))
        assert reserved() == {576 + 320}
        with pytest.raises(CacheFullError) as caught:
            first.step(torch.zeros(1, 400, 32))
        assert caught.value.retryable
        assert first.position == 320
        other.close()
        assert first.step(torch.zeros(1, 400, 32)).shape[1] == 400


def test_a_known_prompt_is_not_computed_again(pair: Pair, model: DistributedTextModel, computed: list[int]) -> None:
    prompt = [1 + token % 90 for token in range(3 * PAGE_TOKENS + 20)]
    first = answer(model, prompt)
    assert first == local_text(pair, prompt, 4)
    del computed[:]
    assert answer(model, prompt) == first
    assert max(computed) == 20
    del computed[:]
    other = [*prompt[: PAGE_TOKENS + 5], 7, 7, 7, *prompt[PAGE_TOKENS + 8 :]]
    assert answer(model, other) == local_text(pair, other, 4)
    assert max(computed) == len(other) - PAGE_TOKENS


def test_the_last_token_of_a_prompt_is_always_computed(pair: Pair, model: DistributedTextModel) -> None:
    prompt = [1 + token % 90 for token in range(5, 5 + 2 * PAGE_TOKENS)]
    assert answer(model, prompt) == answer(model, prompt) == local_text(pair, prompt, 4)


def test_a_client_may_keep_its_prompts_to_itself(
    pair: Pair, model: DistributedTextModel, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarm_client.session_streams.page_hashes", lambda *_: pytest.fail("a prompt was named"))
    monkeypatch.setattr(pair.served.swarm, "config", replace(CLIENT_CONFIG, reuse_prefixes=False))
    prompt = [1 + token % 90 for token in range(PAGE_TOKENS + 20)]
    for _ in range(2):
        answer(model, prompt)
        assert max(computed) == len(prompt)
        del computed[:]


def test_generate_begins_with_what_nodes_know_of_the_prompt(pair: Pair, computed: list[int]) -> None:
    prompt = torch.tensor([[1 + 7 * token % 90 for token in range(2 * PAGE_TOKENS + 9)]])
    whole, expected = pair.generated(prompt, max_new_tokens=5)
    assert torch.equal(whole, expected)
    del computed[:]
    with pair.remote.inference_session(max_length=200) as session:
        assert torch.equal(pair.remote.generate(prompt, max_new_tokens=5), expected)
        assert max(computed) == 9
        assert session.position == expected.shape[1] - 1
        more = pair.remote.generate(prompt[:, :3], max_new_tokens=2)
    follow_up = torch.cat([expected, prompt[:, :3]], dim=1)
    assert torch.equal(torch.cat([expected, more], dim=1), pair.local.generate(follow_up, max_new_tokens=2))
    assert torch.equal(*pair.generated(prompt, max_new_tokens=5, num_beams=2))
    assert torch.equal(*pair.generated(prompt, max_new_tokens=5, do_sample=True))
    assert torch.equal(*pair.generated(prompt, max_new_tokens=5, prompt_lookup_num_tokens=3))
