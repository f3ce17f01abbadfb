"""What fits on a device, and what is refused."""

from dataclasses import replace

import pytest
import torch

from server_node.capacity import cache_tokens_to_reserve, num_blocks_that_fit, num_blocks_to_hold, prefix_tokens_to_keep
from server_node.compute.opened_model import OpenedModel
from server_node.compute.quantized_weights import Int8Rows
from server_node.compute.worker import LoadedSpan
from server_node.config import ModelChoice
from swarm_protocol.errors import ConfigError
from swarm_protocol.model.checkpoint import open_checkpoint
from swarm_protocol.spans import Span
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    save_tiny_model("llama", path)
    return str(path)


def opened(folder: str, free_bytes: int) -> OpenedModel:
    return OpenedModel(open_checkpoint(folder), torch.bfloat16, "cpu", block_bytes=100_000_000, free_bytes=free_bytes)


@pytest.mark.parametrize(("free", "expected"), [(0, 0), (149, 0), (150, 1), (300, 2), (10**9, 7)])
def test_blocks_that_fit_leave_room_for_the_cache(free: int, expected: int):
    assert num_blocks_that_fit(free, 100, 7) == expected


def test_blocks_that_do_not_fit_into_memory_are_refused(folder: str):
    assert num_blocks_to_hold(ModelChoice(folder), opened(folder, 10**9)) == 5
    assert num_blocks_to_hold(ModelChoice(folder), opened(folder, 3 * 10**8)) == 2
    assert num_blocks_to_hold(ModelChoice(folder, num_blocks=3), opened(folder, 3 * 10**8)) == 3
    for choice in (ModelChoice(folder, num_blocks=4), ModelChoice(folder, blocks=Span(0, 4))):
        with pytest.raises(ConfigError, match=r"4 blocks of tiny-llama take 0\.4 GB in bfloat16, but 0\.3 GB are free"):
            num_blocks_to_hold(choice, opened(folder, 3 * 10**8))
    with pytest.raises(ConfigError, match="1 blocks"):
        num_blocks_to_hold(ModelChoice(folder), opened(folder, 10**6))


def test_quantized_blocks_need_room_for_one_that_is_not(folder: str):
    model = replace(opened(folder, 3 * 10**8), loading_bytes=150_000_000, scheme=Int8Rows())
    assert num_blocks_to_hold(ModelChoice(folder), model) == 1
    with pytest.raises(ConfigError, match=r"2 blocks .* 0\.2 GB in int8-row and bfloat16, but 0\.1 GB are free"):
        num_blocks_to_hold(ModelChoice(folder, num_blocks=2), model)
    with pytest.raises(ConfigError, match=r"1 blocks .* but 0\.0 MB are free"):
        num_blocks_to_hold(ModelChoice(folder), replace(model, free_bytes=10**8))


def test_the_cache_takes_half_of_what_is_free_unless_told():
    loaded = LoadedSpan(32, "float32", kv_bytes_per_token=1000, free_bytes=10**6)
    assert cache_tokens_to_reserve(None, loaded) == 500
    assert cache_tokens_to_reserve(1000, loaded) == 1000
    with pytest.raises(ConfigError, match=r"1001 tokens takes 1\.0 MB, but 1\.0 MB are free"):
        cache_tokens_to_reserve(1001, loaded)
    with pytest.raises(ConfigError):
        cache_tokens_to_reserve(None, replace(loaded, free_bytes=10))


def test_prefixes_take_an_eighth_of_the_cache_or_what_is_left():
    loaded = LoadedSpan(hidden_size=8, dtype="float32", kv_bytes_per_token=10, free_bytes=10_000)
    assert prefix_tokens_to_keep(None, 800, loaded) == 100
    assert prefix_tokens_to_keep(None, 950, loaded) == 50
    assert prefix_tokens_to_keep(0, 800, loaded) == 0
    assert prefix_tokens_to_keep(200, 800, loaded) == 200
    with pytest.raises(ConfigError, match="200 would"):
        prefix_tokens_to_keep(201, 800, loaded)
