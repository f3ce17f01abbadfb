"""Keys and values that move between nodes: the same tokens come out behind them, and nothing unfit gets in."""

from pathlib import Path

import pytest
import torch

from server_node.compute.block_loader import load_blocks
from server_node.compute.block_runner import BlockRunner
from server_node.compute.kv_cache import KVCache
from server_node.compute.kv_copies import KVCopies
from server_node.compute.work import AppendWork, ReadWork
from swarm_protocol.errors import InvalidTensorError, MaxLengthError, PositionError
from swarm_protocol.messages import WireTensor
from swarm_protocol.model import open_checkpoint
from swarm_protocol.spans import Span
from swarm_protocol.tensors import from_wire, to_wire
from tests.tiny_models import NUM_BLOCKS, save_tiny_model

SPAN = Span(1, 4)
FAMILIES = ("llama", "bloom", "falcon_alibi", "mistral", "gemma2", "mixtral")


def runner_of(family: str, folder: Path, span: Span = SPAN, dtype: torch.dtype | None = None) -> BlockRunner:
    save_tiny_model(family, folder)
    checkpoint = open_checkpoint(str(folder))
    return load_blocks(checkpoint, span, dtype=dtype or torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> BlockRunner:
    return runner_of("llama", tmp_path_factory.mktemp("llama"))


def hidden(runner: BlockRunner, num_tokens: int, rows: int = 1) -> torch.Tensor:
    size = runner.module.config.hidden_size
    return torch.rand(rows, num_tokens, size, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


def filled(runner: BlockRunner, num_tokens: int, rows: int = 1, blocks: Span = SPAN) -> KVCache:
    cache = runner.new_cache(rows, 200, blocks)
    runner.run_step(cache, hidden(runner, num_tokens, rows), 0, blocks)
    return cache


def copy(source: BlockRunner, target: BlockRunner, cache: KVCache, max_bytes: int, max_tokens: int = 200) -> KVCache:
    """Copy all of a cache, piece by piece, as two nodes do."""
    reading, writing = KVCopies(source), KVCopies(target)
    copied = target.new_cache(cache.batch_size, max_tokens, cache.blocks)
    while True:
        piece = reading.read(ReadWork(cache, copied.position, max_bytes))
        writing.append(AppendWork(copied, copied.position, piece.states))
        if not piece.num_left:
            return copied


@pytest.mark.parametrize("family", FAMILIES)
def test_what_follows_a_copy_is_what_follows_the_original(family: str, tmp_path: Path) -> None:
    runner = runner_of(family, tmp_path)
    cache = filled(runner, 100, rows=2)
    copied = copy(runner, runner, cache, max_bytes=40_000)
    assert copied.position == 100
    more = hidden(runner, 3, rows=2)
    wanted = runner.run_step(cache, more, 100, SPAN)
    assert torch.equal(runner.run_step(copied, more, 100, SPAN), wanted)


def test_a_part_of_a_span_moves_to_a_node_that_serves_more(tmp_path: Path, runner: BlockRunner) -> None:
    other = runner_of("llama", tmp_path, Span(0, NUM_BLOCKS))
    part = Span(2, 4)
    cache = filled(runner, 20, blocks=part)
    copied = copy(runner, other, cache, max_bytes=1000)
    wanted = runner.run_step(cache, hidden(runner, 1), 20, part)
    assert torch.equal(other.run_step(copied, hidden(runner, 1), 20, part), wanted)


def test_an_empty_cache_is_copied_in_no_time(runner: BlockRunner) -> None:
    assert copy(runner, runner, runner.new_cache(1, 10, SPAN), 1000).position == 0


def test_a_piece_is_at_least_a_token(runner: BlockRunner) -> None:
    piece = KVCopies(runner).read(ReadWork(filled(runner, 5), 1, max_bytes=1))
    assert (piece.states.shape[0], piece.num_left) == (1, 3)


def test_behind_a_rollback_there_is_nothing_to_read(runner: BlockRunner) -> None:
    cache = filled(runner, 5)
    cache.rollback(2)
    piece = KVCopies(runner).read(ReadWork(cache, 4, max_bytes=10_000))
    assert (piece.states.shape[0], piece.num_left) == (0, 0)


def changed(states: WireTensor, change: str) -> WireTensor:
    tensor = from_wire(states)
    match change:
        case "nan":
            tensor[3, 7] = float("nan")
        case "infinite":
            tensor[0, 0] = float("inf")
        case "narrow":
            tensor = tensor[:, :-1]
        case "wide":
            tensor = torch.cat([tensor, tensor], dim=1)
        case "flat":
            tensor = tensor.flatten()
        case "dtype":
            tensor = tensor.to(torch.bfloat16)
    return to_wire(tensor)


@pytest.mark.parametrize("change", ["nan", "infinite", "narrow", "wide", "flat", "dtype"])
def test_what_is_unfit_is_refused_and_nothing_is_written(runner: BlockRunner, change: str) -> None:
    copies = KVCopies(runner)
    states = copies.read(ReadWork(filled(runner, 5), 0, 100_000)).states
    cache = filled(runner, 2)
    before = cache.read_tokens(0, 2)
    with pytest.raises(InvalidTensorError):
        copies.append(AppendWork(cache, 1, changed(states, change)))
    assert cache.position == 2
    assert torch.equal(cache.read_tokens(0, 2), before)


def test_no_hole_is_made_and_no_more_is_written_than_was_reserved(runner: BlockRunner) -> None:
    copies = KVCopies(runner)
    states = copies.read(ReadWork(filled(runner, 5), 0, 100_000)).states
    cache = runner.new_cache(1, 7, SPAN)
    with pytest.raises(PositionError):
        copies.append(AppendWork(cache, 1, states))
    copies.append(AppendWork(cache, 0, states))
    with pytest.raises(MaxLengthError):
        copies.append(AppendWork(cache, 5, states))
    assert cache.position == 5
    copies.append(AppendWork(cache, 2, states))
    assert cache.position == 7
