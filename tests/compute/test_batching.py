"""Decode steps of several sessions in one forward equal the same steps one by one, for every family."""

import logging
import sys
from typing import Any

import pytest
import torch

from server_node.compute import batch_attention, batch_runner
from server_node.compute.batch_runner import BatchRunner, DecodeStep, Joining
from server_node.compute.block_runner import BlockRunner
from server_node.compute.kv_cache import KVCache
from swarm_protocol.errors import PositionError
from swarm_protocol.model import load_span, open_checkpoint
from swarm_protocol.spans import Span
from tests.tiny_models import TINY_CONFIGS, save_tiny_model

WHOLE, PART = Span(0, 5), Span(1, 4)
SESSIONS = ((3, 1), (17, 2), (9, 1), (1, 3))
"""Tokens and rows."""


@pytest.fixture(scope="module", params=list(TINY_CONFIGS))
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BlockRunner:
    return make_runner(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> BlockRunner:
    return make_runner("llama", tmp_path_factory)


def make_runner(name: str, tmp_path_factory: pytest.TempPathFactory, **changes: Any) -> BlockRunner:
    folder = tmp_path_factory.mktemp(name)
    save_tiny_model(name, folder, **changes)
    return BlockRunner(load_span(open_checkpoint(str(folder)), WHOLE, dtype=torch.float32, device=torch.device("cpu")))


class Pair:
    """The same sessions twice: one batched, one step by step by itself."""

    def __init__(self, runner: BlockRunner, blocks: Span, sessions: tuple[tuple[int, int], ...] = SESSIONS) -> None:
        self.runner, self.blocks, self.num_rows = runner, blocks, [rows for _, rows in sessions]
        self.batches = BatchRunner(runner)
        self._generator = torch.Generator().manual_seed(2)
        self.batched, self.alone = [], []
        for num_tokens, num_rows in sessions:
            prompt = self.random(num_rows, num_tokens)
            for caches in (self.batched, self.alone):
                caches.append(runner.new_cache(num_rows, 64, blocks))
                runner.run_step(caches[-1], prompt, 0, blocks)

    def random(self, num_rows: int, num_tokens: int = 1) -> torch.Tensor:
        hidden_size = self.runner.module.config.hidden_size
        return torch.randn(num_rows, num_tokens, hidden_size, generator=self._generator)

    def step(self, **special: Any) -> None:
        """Decode a token in every session; `special` are fields of the step of session 1."""
        states = [self.random(num_rows) for num_rows in self.num_rows]
        positions = [cache.position for cache in self.alone]
        positions[1] = special.pop("position", positions[1])
        fields: list[dict[str, Any]] = [{}, special, {}, {}]
        found = self.batches.run(
            [
                DecodeStep(cache, state, position, self.blocks, **extra)
                for cache, state, position, extra in zip(self.batched, states, positions, fields, strict=True)
            ]
        )
        for output, cache, state, position, extra in zip(found, self.alone, states, positions, fields, strict=True):
            assert_same(output, self.runner.run_step(cache, state, position, self.blocks, **extra))
        assert [cache.position for cache in self.batched] == [cache.position for cache in self.alone]


def assert_same(found: torch.Tensor | Exception, wanted: torch.Tensor) -> None:
    assert isinstance(found, torch.Tensor), found
    assert found.shape == wanted.shape
    assert ((found - wanted).abs().max() / wanted.abs().max()).item() <= 1e-5


@pytest.fixture
def num_forwards(runner: BlockRunner, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return count_forwards(runner, monkeypatch)


def count_forwards(runner: BlockRunner, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the rows of every forward."""
    rows: list[int] = []
    original = runner.module.forward

    def forward(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        rows.append(hidden_states.shape[0])
        return original(hidden_states, **kwargs)

    monkeypatch.setattr(runner.module, "forward", forward)
    return rows


@pytest.mark.parametrize("blocks", [WHOLE, PART], ids=str)
def test_batched_steps_equal_single_ones(runner: BlockRunner, blocks: Span, num_forwards: list[int]) -> None:
    pair = Pair(runner, blocks)
    assert pair.batches.joining is Joining.PADDED
    num_forwards.clear()
    for _ in range(8):
        pair.step()
    # One forward of all rows, and four that it is compared with.
    assert num_forwards == [7, 1, 2, 1, 3] * 8


def test_a_session_rolls_back_and_permutes_its_rows_in_the_midst(runner: BlockRunner) -> None:
    pair = Pair(runner, WHOLE)
    pair.step()
    pair.step(position=8)
    pair.step(row_order=[1, 0])
    pair.step(position=5, row_order=[1, 1])
    pair.step()


def test_batched_tokens_are_there_for_a_step_alone(runner: BlockRunner) -> None:
    pair = Pair(runner, WHOLE)
    for _ in range(3):
        pair.step()
    for batched, alone, num_rows in zip(pair.batched, pair.alone, pair.num_rows, strict=True):
        more = pair.random(num_rows, 4)
        assert_same(
            runner.run_step(batched, more, batched.position, WHOLE),
            runner.run_step(alone, more, alone.position, WHOLE),
        )


def steps_of(pair: Pair) -> list[DecodeStep]:
    return [DecodeStep(cache, pair.random(cache.batch_size), cache.position, WHOLE) for cache in pair.batched]


def test_a_step_that_is_refused_fails_alone(llama: BlockRunner) -> None:
    pair = Pair(llama, WHOLE)
    steps = steps_of(pair)
    steps[2] = DecodeStep(pair.batched[2], steps[2].hidden_states, 10, WHOLE)
    results = pair.batches.run(steps)
    assert isinstance(results[2], PositionError)
    assert [cache.position for cache in pair.batched] == [4, 18, 9, 2]
    for number in (0, 1, 3):
        cache = pair.alone[number]
        assert_same(results[number], llama.run_step(cache, steps[number].hidden_states, cache.position, WHOLE))


def test_a_batch_that_fails_runs_one_by_one_and_the_culprit_fails_alone(
    llama: BlockRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pair = Pair(llama, WHOLE)
    assert pair.batches.joining is Joining.PADDED
    steps = steps_of(pair)
    update = KVCache.update

    def broken(cache: KVCache, keys: Any, values: Any, layer_idx: int, *args: Any) -> Any:
        if cache is pair.batched[1] and layer_idx == 2:
            raise MemoryError("no more")
        return update(cache, keys, values, layer_idx, *args)

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "update", broken)
        results = pair.batches.run(steps)
    assert isinstance(results[1], MemoryError)
    assert [cache.position for cache in pair.batched] == [4, 17, 10, 2]
    assert "run one by one" in caplog.text
    for number in (0, 2, 3):
        cache = pair.alone[number]
        assert_same(results[number], llama.run_step(cache, steps[number].hidden_states, cache.position, WHOLE))
    # Nothing is left behind of the failed step.
    pair.alone[0], pair.alone[2], pair.alone[3] = pair.batched[0], pair.batched[2], pair.batched[3]
    found = pair.batches.run([steps[1]])[0]
    assert_same(found, llama.run_step(pair.alone[1], steps[1].hidden_states, 17, WHOLE))


def test_a_step_without_tokens_does_not_break_up_a_batch(llama: BlockRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(llama, WHOLE)
    steps = steps_of(pair)
    steps[1] = DecodeStep(pair.batched[1], pair.random(2, 0), 4, WHOLE)
    rows = count_forwards(llama, monkeypatch)
    results = pair.batches.run(steps)
    assert rows == [5]
    assert isinstance(results[1], torch.Tensor)
    assert results[1].shape == (2, 0, 32)
    assert [cache.position for cache in pair.batched] == [4, 4, 10, 2]


# what the probe finds


@pytest.mark.parametrize(
    ("breaks_at", "wanted"), [("mask", Joining.EQUAL), ("batch", Joining.ALONE), (None, Joining.PADDED)]
)
def test_a_family_that_cannot_be_batched_is_found_out(
    llama: BlockRunner,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    breaks_at: str,
    wanted: Joining,
) -> None:
    original = llama.module.forward

    def forward(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        output = original(hidden_states, **kwargs)
        is_masked = kwargs.get("attention_mask") is not None
        is_batch = isinstance(kwargs.get("cache"), batch_runner.BatchCache)
        if (breaks_at == "mask" and is_masked) or (breaks_at == "batch" and is_batch):
            output *= 1.01
        return output

    monkeypatch.setattr(llama.module, "forward", forward)
    monkeypatch.setattr(batch_runner, "_LEAST_WINDOW", sys.maxsize + 1)  # as for a family that has to be padded
    caplog.set_level(logging.INFO)
    batches = BatchRunner(llama)
    assert batches.joining is wanted
    assert not batches.pads_nothing
    assert wanted.value in caplog.text
    one, other, third = (llama.new_cache(1, 10) for _ in range(3))
    groups = [batches.group(one, WHOLE, 3), batches.group(other, WHOLE, 3), batches.group(third, WHOLE, 4)]
    assert len(set(groups)) == {Joining.PADDED: 1, Joining.EQUAL: 2, Joining.ALONE: 3}[wanted]


@pytest.mark.parametrize(("name", "is_in_place"), [("llama", True), ("gpt_neox", True), ("bloom", False)])
def test_attention_that_is_chosen_by_name_needs_no_padding(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, name: str, is_in_place: bool
) -> None:
    pair = Pair(make_runner(name, tmp_path_factory), WHOLE)
    assert pair.batches.pads_nothing is is_in_place
    copied: list[int] = []
    original = batch_runner.BatchCache.update

    def update(self: batch_runner.BatchCache, *args: Any) -> Any:
        copied.append(self.num_rows)
        return original(self, *args)

    monkeypatch.setattr(batch_runner.BatchCache, "update", update)
    pair.step()
    assert bool(copied) is not is_in_place


def test_attention_in_place_that_differs_is_given_up_for_padding(
    llama: BlockRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = batch_attention.SessionsCache.attend

    def attend(self: batch_attention.SessionsCache, *args: Any) -> Any:
        output, weights = original(self, *args)
        return output * 1.01, weights

    monkeypatch.setattr(batch_attention.SessionsCache, "attend", attend)
    batches = BatchRunner(llama)
    assert batches.joining is Joining.PADDED
    assert not batches.pads_nothing


def test_sessions_longer_than_a_window_are_padded(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner("mistral", tmp_path_factory, sliding_window=20)
    pair = Pair(runner, WHOLE, ((3, 1), (18, 1), (9, 1), (1, 1)))
    assert pair.batches.pads_nothing
    padded: list[bool] = []
    original = pair.batches._run_padded
    monkeypatch.setattr(pair.batches, "_run_padded", lambda *args: (padded.append(True), original(*args))[1])
    for wanted in (0, 0, 1, 2):  # the second session holds 19, 20, 21 and 22 tokens then
        pair.step()
        assert len(padded) == wanted


def test_the_blocks_have_their_own_attention_again_after_a_batch(llama: BlockRunner) -> None:
    pair = Pair(llama, PART)
    before = llama.module.config_of(PART)._attn_implementation
    pair.step()
    configs = [
        llama.module.config,
        llama.module.config_of(PART),
        *(m.config for m in llama.module.modules() if hasattr(m, "config")),
    ]
    assert {config._attn_implementation for config in configs} == {before}


def test_rotary_embeddings_scaled_by_the_longest_row_are_batched_by_length(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert BatchRunner(make_runner("llama", tmp_path_factory, rope_parameters=rope)).joining is Joining.EQUAL


def test_different_blocks_are_different_groups(llama: BlockRunner) -> None:
    batches = BatchRunner(llama)
    assert batches.group(llama.new_cache(1, 9), WHOLE, 3) != batches.group(llama.new_cache(1, 9, PART), PART, 3)
