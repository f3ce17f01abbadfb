"""What fits on a device, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from server_node.capacity import cache_tokens_to_reserve, num_blocks_that_fit, num_blocks_to_hold, prefix_tokens_to_keep
from server_node.compute.opened_model import OnDisk, OpenedModel
from server_node.compute.worker import LoadedSpan
from server_node.config import ModelChoice
from swarm_protocol.errors import ConfigError
from swarm_protocol.model.checkpoint import open_checkpoint
from swarm_protocol.model.quantized_weights import Int8Rows
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


def test_by_default_as_many_blocks_are_held_as_memory_and_disk_have_room_for(folder: str):
    assert num_blocks_to_hold(ModelChoice(folder), opened(folder, 10**9)) == 5
    assert num_blocks_to_hold(ModelChoice(folder), opened(folder, 3 * 10**8)) == 2
    for room_bytes, expected in ((49_999_999, 1), (50_000_000, 2), (10**9, 5)):
        model = replace(opened(folder, 10**9), disk=OnDisk(25_000_000, room_bytes, is_bounded=True))
        assert num_blocks_to_hold(ModelChoice(folder), model) == expected


@pytest.mark.parametrize(
    ("choice", "free_bytes", "message"),
    [
        (
            {"num_blocks": 4},
            300_000_000,
            "4 blocks of tiny-llama take 0.4 GB in bfloat16, but 0.3 GB of memory are free: 2 blocks would fit with a "
            "KV cache: use --num-blocks 2, or a smaller --dtype or --quantization",
        ),
        (
            {"blocks": Span(1, 5)},
            150_000_000,
            "4 blocks of tiny-llama take 0.4 GB in bfloat16, but 0.1 GB of memory are free: 1 block would fit with a "
            "KV cache: use --num-blocks 1, or a smaller --dtype or --quantization",
        ),
        (
            {"num_blocks": 4},
            1_000_000,
            "4 blocks of tiny-llama take 0.4 GB in bfloat16, but 1.0 MB of memory are free: not one block would fit "
            "with a KV cache: free memory, or use a smaller --dtype or --quantization",
        ),
        (
            {},
            120_000_000,
            "1 block of tiny-llama takes 0.1 GB in bfloat16, but 0.1 GB of memory are free, too little for a KV cache "
            "of half its size: use a smaller --dtype or --quantization, or --num-blocks 1 to try it",
        ),
        (
            {},
            0,
            "1 block of tiny-llama takes 0.1 GB in bfloat16, but 0.0 MB of memory are free: not one block would fit "
            "with a KV cache: free memory, or use a smaller --dtype or --quantization",
        ),
    ],
)
def test_a_refusal_for_memory_names_what_would_fit(
    folder: str, choice: dict[str, Any], free_bytes: int, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        num_blocks_to_hold(ModelChoice(folder, **choice), opened(folder, free_bytes))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("room_bytes", "is_bounded", "message"),
    [
        (
            60_000_000,
            True,
            "3 blocks of tiny-llama take 75.0 MB on disk, but --max-disk leaves 60.0 MB for them: 2 blocks would fit: "
            "use --num-blocks 2, or free some, raise --max-disk or name another --cache-dir",
        ),
        (
            30_000_000,
            False,
            "3 blocks of tiny-llama take 75.0 MB on disk, but the disk has 30.0 MB for them: 1 block would fit: "
            "use --num-blocks 1, or free some, or name another --cache-dir",
        ),
        (
            10_000_000,
            False,
            "3 blocks of tiny-llama take 75.0 MB on disk, but the disk has 10.0 MB for them: not one block would fit: "
            "free some, or name another --cache-dir",
        ),
    ],
)
def test_a_refusal_for_the_disk_names_what_would_fit(
    folder: str, room_bytes: int, is_bounded: bool, message: str
) -> None:
    model = replace(opened(folder, 10**9), disk=OnDisk(25_000_000, room_bytes, is_bounded))
    with pytest.raises(ConfigError) as caught:
        num_blocks_to_hold(ModelChoice(folder, num_blocks=3), model)
    assert str(caught.value) == message


@pytest.mark.parametrize("choice", [{"num_blocks": 6}, {"blocks": Span(4, 6)}])
def test_blocks_that_the_model_has_not_are_refused(folder: str, choice: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="tiny-llama has"):
        num_blocks_to_hold(ModelChoice(folder, **choice), opened(folder, 10**9))


def test_quantized_blocks_need_room_for_one_that_is_not(folder: str):
    model = replace(opened(folder, 3 * 10**8), loading_bytes=150_000_000, scheme=Int8Rows())
    assert num_blocks_to_hold(ModelChoice(folder), model) == 1
    with pytest.raises(ConfigError, match=r"2 blocks .* 0\.2 GB in int8-row and bfloat16, but 0\.1 GB of memory"):
        num_blocks_to_hold(ModelChoice(folder, num_blocks=2), model)
    with pytest.raises(ConfigError, match=r"1 block .* but 0\.0 MB of memory are free"):
        num_blocks_to_hold(ModelChoice(folder), replace(model, free_bytes=10**8))


def test_the_cache_takes_half_of_what_is_free_unless_told():
    loaded = LoadedSpan(32, "float32", kv_bytes_per_token=1000, free_bytes=10**6)
    assert cache_tokens_to_reserve(None, loaded) == 500
    assert cache_tokens_to_reserve(1000, loaded) == 1000
    with pytest.raises(ConfigError, match=r"1001 tokens takes 1\.0 MB, but 1\.0 MB are free, enough for 1000"):
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
