from pathlib import Path

import pytest
import torch

from server_node.compute.block_loader import load_blocks, module_bytes
from server_node.compute.block_runner import BlockRunner
from server_node.compute.kv_cache import PAGE_TOKENS, KVCache
from swarm_protocol.errors import (
    BlocksNotServedError,
    InvalidRequestError,
    InvalidTensorError,
    MaxLengthError,
    PositionError,
)
from swarm_protocol.model import open_checkpoint
from swarm_protocol.spans import Span
from tests.tiny_models import save_tiny_model

SPAN = Span(1, 4)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> BlockRunner:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_model("llama", folder)
    return load_blocks(open_checkpoint(str(folder)), SPAN, device=torch.device("cpu"))


def hidden(num_tokens: int, batch_size: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch_size, num_tokens, 32, generator=torch.Generator().manual_seed(seed))


def test_loaded_blocks_know_their_size(runner: BlockRunner) -> None:
    per_block = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48 + 2 * 32
    buffers = 2 * 4  # rotary frequencies
    assert module_bytes(runner.module) == 4 * (3 * per_block + buffers)
    assert not any(weight.requires_grad for weight in runner.module.parameters())


def test_a_cache_grows_in_pages_and_not_beyond_its_maximum(runner: BlockRunner) -> None:
    cache = runner.new_cache(1, 150)
    assert (cache.size_bytes, cache.capacity_tokens) == (0, 0)
    sizes = []
    for position in range(150):
        runner.run_step(cache, hidden(1), position, SPAN)
        sizes.append(cache.capacity_tokens)
    assert sizes[0] == sizes[PAGE_TOKENS - 1] == PAGE_TOKENS
    assert sizes[PAGE_TOKENS] == 2 * PAGE_TOKENS
    assert sizes[-1] == 150


def test_growing_keeps_what_is_cached(runner: BlockRunner) -> None:
    states = hidden(200)
    wanted = runner.forward(states, SPAN)
    cache = runner.new_cache(1, 300)
    found = [runner.run_step(cache, states[:, at : at + 25], at, SPAN) for at in range(0, 200, 25)]
    torch.testing.assert_close(torch.cat(found, dim=1), wanted)


def test_update_returns_views_and_copies_nothing(runner: BlockRunner) -> None:
    cache = runner.new_cache(1, 64)
    runner.run_step(cache, hidden(3), 0, SPAN)
    states = torch.rand(1, 2, 1, 8)
    with torch.inference_mode():
        keys, values = cache.update(states, states, SPAN.start)
        again, _ = cache.update(states, states, SPAN.start)
    assert keys.shape == values.shape == (1, 2, 4, 8)
    assert keys.data_ptr() == again.data_ptr()
    assert cache.position == 3


def test_a_step_that_fails_leaves_the_position_alone(runner: BlockRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = runner.new_cache(1, 64)
    first = runner.run_step(cache, hidden(3), 0, SPAN)
    with monkeypatch.context() as patch:
        patch.setattr(runner.module.blocks[2], "forward", None)
        with pytest.raises(TypeError):
            runner.run_step(cache, hidden(2), 3, SPAN)
    assert cache.position == 3
    torch.testing.assert_close(runner.run_step(cache, hidden(3), 0, SPAN), first)


def test_rollback_goes_back_only(runner: BlockRunner) -> None:
    cache = runner.new_cache(1, 64)
    runner.run_step(cache, hidden(5), 0, SPAN)
    cache.rollback(2)
    assert cache.position == 2
    for position in (-1, 3):
        with pytest.raises(PositionError):
            cache.rollback(position)


def test_steps_that_do_not_fit_are_refused_before_anything_changes(runner: BlockRunner) -> None:
    cache = runner.new_cache(2, 10)
    runner.run_step(cache, hidden(5, 2), 0, SPAN)
    with pytest.raises(PositionError):
        runner.run_step(cache, hidden(1, 2), 6, SPAN)
    with pytest.raises(MaxLengthError, match=r"prefix 5 \+ current 6 exceeds pre-allocated maximum 10"):
        runner.run_step(cache, hidden(6, 2), 5, SPAN)
    with pytest.raises(InvalidTensorError, match="3 rows"):
        runner.run_step(cache, hidden(1, 3), 5, SPAN)
    with pytest.raises(InvalidTensorError, match="batch, seq, 32"):
        runner.run_step(cache, torch.rand(2, 1, 31), 5, SPAN)
    with pytest.raises(InvalidTensorError, match="int64"):
        runner.run_step(cache, torch.ones(2, 1, 32, dtype=torch.long), 5, SPAN)
    with pytest.raises(BlocksNotServedError):
        runner.run_step(cache, hidden(1, 2), 5, Span(1, 3))
    with pytest.raises(BlocksNotServedError):
        runner.forward(hidden(1), Span(0, 2))
    for row_order in ([0], [0, 2], [-1, 0]):
        with pytest.raises(InvalidRequestError):
            runner.run_step(cache, hidden(1, 2), 2, SPAN, row_order)
    assert cache.position == 5


def test_a_cache_for_blocks_outside_of_the_span_is_refused(runner: BlockRunner) -> None:
    with pytest.raises(BlocksNotServedError):
        KVCache(runner.module, 1, 10, Span(3, 5))


def test_a_step_without_tokens_only_rolls_back_and_reorders(runner: BlockRunner) -> None:
    cache = runner.new_cache(2, 10)
    runner.run_step(cache, hidden(5, 2), 0, SPAN)
    assert runner.run_step(cache, hidden(0, 2), 3, SPAN, [1, 0]).shape == (2, 0, 32)
    assert cache.position == 3


def test_other_dtypes_are_taken_and_the_blocks_own_is_given(runner: BlockRunner) -> None:
    output = runner.run_step(runner.new_cache(1, 10), hidden(2).to(torch.bfloat16), 0, SPAN)
    assert output.dtype == torch.float32
    assert output.is_inference()


def test_gradients_flow_through_a_stateless_forward(runner: BlockRunner) -> None:
    states = hidden(4).requires_grad_()
    runner.forward(states, SPAN).sum().backward()
    assert states.grad is not None
    assert states.grad.abs().max() > 0


def test_blocks_are_loaded_in_the_dtype_that_the_node_runs(tmp_path: Path) -> None:
    save_tiny_model("opt", tmp_path)
    loaded = load_blocks(open_checkpoint(str(tmp_path)), Span(0, 2), dtype=torch.bfloat16, device=torch.device("cpu"))
    assert loaded.module.dtype == torch.bfloat16
    assert loaded.forward(hidden(3), Span(0, 1)).dtype == torch.bfloat16
