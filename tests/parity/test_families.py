"""Every family, cut in every way, computes what the whole model of transformers computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from server_node.compute.block_runner import BlockRunner
from server_node.compute.kv_cache import KVCache, kv_bytes_per_token
from swarm_protocol.model import EndsModule, SpanModule, build_client_model, load_ends, load_span, open_checkpoint
from swarm_protocol.model.checkpoint import Checkpoint
from swarm_protocol.spans import Span
from tests.tiny_models import NUM_BLOCKS, TINY_CONFIGS, VOCAB_SIZE, save_tiny_model

CPU = torch.device("cpu")
FLOAT32: dict[str, Any] = {"dtype": torch.float32, "device": CPU}
CUTS = [(Span(0, 5),), (Span(0, 2), Span(2, 5)), (Span(0, 1), Span(1, 4), Span(4, 5))]
PIECES = (7, 4, 1, 1, 5, 1, 1)


class Parts:
    """A tiny model, whole and as parts; the parts are loaded when a test first asks for them."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.whole: PreTrainedModel = save_tiny_model(name, folder)
        self.checkpoint: Checkpoint = open_checkpoint(str(folder))
        self._spans: dict[Span, SpanModule] = {}
        self.ends: EndsModule = load_ends(self.checkpoint, **FLOAT32)
        self.ids = torch.randint(4, VOCAB_SIZE, (2, sum(PIECES)), generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            self.logits: torch.Tensor = self.whole(self.ids).logits

    def span(self, span: Span) -> SpanModule:
        if span not in self._spans:
            self._spans[span] = load_span(self.checkpoint, span, **FLOAT32)
        return self._spans[span]

    def runners(self, cut: tuple[Span, ...]) -> list[BlockRunner]:
        return [BlockRunner(self.span(span)) for span in cut]


@pytest.fixture(scope="module", params=list(TINY_CONFIGS))
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return Parts(request.param, tmp_path_factory.mktemp(request.param))


class Chain:
    """A session through runners, each with the part of its span that it is to run."""

    def __init__(self, parts: Parts, runners: list[BlockRunner], blocks: list[Span] | None = None) -> None:
        self.ends = parts.ends
        self.runners = runners
        self.blocks = blocks or [runner.span for runner in runners]
        self.caches = [runner.new_cache(2, 64, part) for runner, part in zip(runners, self.blocks, strict=True)]

    def step(self, ids: torch.Tensor, position: int, row_order: list[int] | None = None) -> torch.Tensor:
        with torch.inference_mode():
            hidden_states = self.ends.embed(ids, position)
            for runner, cache, blocks in zip(self.runners, self.caches, self.blocks, strict=True):
                hidden_states = runner.run_step(cache, hidden_states, position, blocks, row_order)
            return self.ends.logits(hidden_states)

    def pieces(self, ids: torch.Tensor) -> torch.Tensor:
        outputs, position = [], 0
        for size in PIECES:
            outputs.append(self.step(ids[:, position : position + size], position))
            position += size
        return torch.cat(outputs, dim=1)


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    relative_error = ((found - wanted).abs().max() / wanted.abs().max()).item()
    assert relative_error <= 1e-5
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))


@pytest.mark.parametrize("cut", CUTS, ids=["1-span", "2-spans", "3-spans"])
def test_spans_equal_the_whole_model_in_uneven_pieces_and_single_steps(parts: Parts, cut: tuple[Span, ...]) -> None:
    assert_same(Chain(parts, parts.runners(cut)).pieces(parts.ids), parts.logits)


def test_a_forward_without_a_cache_equals_the_whole_model(parts: Parts) -> None:
    with torch.inference_mode():
        hidden_states = parts.ends.embed(parts.ids)
        for runner in parts.runners(CUTS[2]):
            hidden_states = runner.forward(hidden_states, runner.span)
        assert_same(parts.ends.logits(hidden_states), parts.logits)


def test_what_goes_through_in_pieces_equals_the_whole_model(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server_node.compute.block_runner.SCORES_BYTES", 4000)
    chain = Chain(parts, parts.runners(CUTS[1]))
    assert all(runner._piece_tokens(*parts.ids.shape) < parts.ids.shape[1] for runner in chain.runners)
    assert_same(chain.step(parts.ids, 0), parts.logits)
    test_a_forward_without_a_cache_equals_the_whole_model(parts)


def test_sub_ranges_of_spans_equal_the_whole_model(parts: Parts) -> None:
    first, last = parts.span(Span(0, 5)), parts.span(Span(1, 4))
    runners = [BlockRunner(first), BlockRunner(last), BlockRunner(first)]
    chain = Chain(parts, runners, [Span(0, 2), Span(2, 3), Span(3, 5)])
    assert_same(chain.pieces(parts.ids), parts.logits)


def test_a_rollback_and_another_continuation_equal_the_whole_model(parts: Parts) -> None:
    chain = Chain(parts, parts.runners(CUTS[1]))
    chain.pieces(parts.ids)
    other = torch.cat([parts.ids[:, :9], parts.ids.flip(1)[:, :8]], dim=1)
    with torch.inference_mode():
        wanted = parts.whole(other).logits[:, 9:]
    found = [chain.step(other[:, 9:12], 9), *(chain.step(other[:, [at]], at) for at in range(12, 17))]
    assert_same(torch.cat(found, dim=1), wanted)


def test_permuted_rows_go_on_as_the_rows_that_they_are_copies_of(parts: Parts) -> None:
    chain = Chain(parts, parts.runners(CUTS[1]))
    chain.step(parts.ids[:, :10], 0)
    found = chain.step(parts.ids[[1, 1], 10:11], 10, row_order=[1, 1])
    assert_same(found, parts.logits[[1, 1], 10:11])


def test_the_cache_takes_as_much_as_is_accounted_for(parts: Parts) -> None:
    runner = BlockRunner(parts.span(Span(1, 4)))
    cache = runner.new_cache(2, 100)
    runner.run_step(cache, torch.rand(2, 3, parts.checkpoint.config.hidden_size), 0, runner.span)
    per_token = kv_bytes_per_token(parts.checkpoint.config, runner.span, torch.float32)
    assert cache.size_bytes == 2 * cache.capacity_tokens * per_token


def test_a_span_holds_its_own_blocks_and_nothing_else(parts: Parts) -> None:
    whole = sum(weight.numel() for weight in parts.span(Span(0, 5)).parameters())
    assert sum(sum(weight.numel() for weight in parts.span(part).parameters()) for part in CUTS[2]) == whole
    names = {name for name, _ in parts.span(Span(1, 4)).named_parameters()}
    assert all(".0." in name or ".1." in name or ".2." in name for name in names)


class LocalCache(Cache):
    """A cache of the client's that keeps the spans' caches, as that of a remote session would."""

    def __init__(self, spans: list[SpanModule]) -> None:
        super().__init__(layers=[])
        self.parts = [KVCache(span, 2, 64) for span in spans]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.parts[0].position

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


class LocalBlocks(nn.Module):
    """Stands in the place of the blocks and runs spans of this process."""

    def __init__(self, spans: list[SpanModule]) -> None:
        super().__init__()
        self.spans = nn.ModuleList(spans)

    def forward(self, hidden_states: torch.Tensor, *, past_key_values: Any, position_ids: Any) -> torch.Tensor:
        caches = past_key_values.parts if past_key_values is not None else [None] * len(self.spans)
        for span, cache in zip(self.spans, caches, strict=True):
            hidden_states = span(hidden_states, cache=cache)
        return hidden_states


def test_the_client_model_equals_the_whole_model(parts: Parts) -> None:
    spans = [parts.span(span) for span in CUTS[2]]
    model = build_client_model(parts.checkpoint, LocalBlocks(spans), **FLOAT32)
    assert type(model) is type(parts.whole)
    with torch.inference_mode():
        assert_same(model(parts.ids, use_cache=False).logits, parts.logits)
        cache, outputs, position = LocalCache(spans), [], 0
        for size in PIECES:
            piece = parts.ids[:, position : position + size]
            outputs.append(model(piece, past_key_values=cache, use_cache=True).logits)
            position += size
        assert_same(torch.cat(outputs, dim=1), parts.logits)
        assert_same(EndsModule(model).embed(parts.ids, 0), parts.ends.embed(parts.ids, 0))


def test_gradients_flow_through_the_blocks_as_through_the_whole_model(parts: Parts) -> None:
    spans = [parts.span(span).requires_grad_(False) for span in CUTS[1]]
    model = build_client_model(parts.checkpoint, LocalBlocks(spans), **FLOAT32)
    ids = parts.ids[:, :6]
    gradients = []
    for candidate in (model, parts.whole):
        candidate.zero_grad()
        candidate(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(candidate.get_input_embeddings().weight.grad)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)
    assert parts.checkpoint.num_blocks == NUM_BLOCKS
