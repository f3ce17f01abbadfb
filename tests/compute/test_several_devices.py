"""A span that is split between devices computes what it does on one; `meta` shows where tensors lie."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from server_node.capacity import num_blocks_to_hold
from server_node.compute.batch_runner import BatchCache, BatchRunner, DecodeStep, Joining
from server_node.compute.block_loader import load_blocks
from server_node.compute.block_runner import BlockRunner
from server_node.compute.device import device_rooms, hardware_name, usable_devices
from server_node.compute.device_plan import DeviceRoom, cache_room_bytes, num_that_fit, split_blocks
from server_node.compute.kv_cache import KVCache
from server_node.compute.opened_model import open_model
from server_node.compute.worker import ComputeWorker
from server_node.config import ModelChoice
from swarm_protocol.errors import ConfigError
from swarm_protocol.messages import PAGE_TOKENS
from swarm_protocol.model import open_checkpoint
from swarm_protocol.model.tensor_loading import TensorLoader
from swarm_protocol.spans import Span
from tests.tiny_models import save_tiny_model

CPU, META = torch.device("cpu"), torch.device("meta")
SPAN = Span(0, 4)
FAMILIES = ["llama", "bloom", "gemma2", "gpt2", "qwen3_moe"]


# --- which block goes where


@pytest.mark.parametrize(
    ("num_blocks", "free_bytes", "wanted"),
    [
        (4, (100, 100), (2, 2)),
        (5, (100, 100), (3, 2)),
        (4, (1000, 0), (4, 0)),
        (6, (40, 20), (4, 2)),
        (3, (15, 25), (1, 2)),
        (3, (100,), (3,)),
        (1, (10, 20, 30), (0, 0, 1)),
    ],
)
def test_blocks_are_split_by_what_is_free(num_blocks: int, free_bytes: tuple[int, ...], wanted: tuple[int, ...]):
    assert split_blocks(num_blocks, 10, free_bytes) == wanted


def test_all_blocks_that_fit_find_a_place():
    for free_bytes in ((19, 35, 9), (10, 10, 10), (55, 0, 21)):
        counts = split_blocks(num_that_fit(10, free_bytes), 10, free_bytes)
        assert all(10 * count <= free for count, free in zip(counts, free_bytes, strict=True))
    assert num_that_fit(10, (19, 19)) == 2


def test_the_device_with_the_least_room_for_its_blocks_bounds_the_cache():
    assert cache_room_bytes((2, 1), (100, 30)) == 90
    assert cache_room_bytes((2, 0), (100, 0)) == 100
    assert cache_room_bytes((4,), (100,)) == 100


def test_devices_of_several_types_are_refused():
    with pytest.raises(ConfigError, match="device 'meta' cannot be used"):
        usable_devices("cpu,meta")
    assert usable_devices("cpu, cpu") == (CPU, CPU)
    assert hardware_name("cpu,cpu").count("cores") == 2


def test_memory_of_a_device_that_is_named_twice_is_counted_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("server_node.compute.device.free_memory_bytes", lambda _: 100)
    assert [room.free_bytes for room in device_rooms((CPU, CPU))] == [50, 50]


def test_a_device_without_room_for_a_block_is_named(tmp_path: Path):
    save_tiny_model("llama", tmp_path)
    model = open_model(ModelChoice(str(tmp_path)), "cpu,cpu", "float32", "none")
    rooms = (DeviceRoom("cuda:0", 3 * model.block_bytes), DeviceRoom("cuda:1", model.block_bytes - 1))
    model = replace(model, rooms=rooms, free_bytes=sum(room.free_bytes for room in rooms))
    assert num_blocks_to_hold(ModelChoice(str(tmp_path)), model) == 2
    assert num_blocks_to_hold(ModelChoice(str(tmp_path), num_blocks=3), model) == 3
    with pytest.raises(ConfigError, match=r"on cuda:0; 0\.\d MB on cuda:1, too small for a block"):
        num_blocks_to_hold(ModelChoice(str(tmp_path), num_blocks=4), model)


def test_each_block_is_loaded_on_its_own_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_tiny_model("llama", tmp_path)
    checkpoint, real, asked = open_checkpoint(str(tmp_path)), TensorLoader.load, []

    def load(loader: TensorLoader, model: PreTrainedModel, device: torch.device, block: int | None) -> None:
        asked.append((block, device))
        real(loader, model, CPU, block)

    monkeypatch.setattr(TensorLoader, "load", load)
    devices = (CPU, META, META)
    module = load_blocks(checkpoint, Span(1, 4), dtype=torch.float32, device=CPU, devices=devices).module
    assert asked == list(zip((1, 2, 3), devices, strict=True))
    assert module.places == devices


# --- what it computes


@pytest.fixture(params=FAMILIES)
def runners(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[BlockRunner, BlockRunner]:
    save_tiny_model(request.param, tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    one, several = (
        load_blocks(checkpoint, SPAN, dtype=torch.float32, device=CPU, devices=devices)
        for devices in ((), (CPU, CPU, CPU, CPU))
    )
    # On a CPU alone there is nothing to bring; the hooks are there all the same.
    several.module.place((CPU,) * 4)
    return one, several


def states(runner: BlockRunner, num_rows: int, num_tokens: int) -> torch.Tensor:
    size = runner.module.config.hidden_size
    return torch.randn(num_rows, num_tokens, size, generator=torch.Generator().manual_seed(num_tokens))


def session(runner: BlockRunner) -> tuple[torch.Tensor, KVCache]:
    """Return what a session saw: a prompt, steps, a rollback, rows in another order."""
    cache = runner.new_cache(2, 200)
    outputs = [runner.run_step(cache, states(runner, 2, 70), 0, SPAN)]
    outputs.append(runner.run_step(cache, states(runner, 2, 1), 70, SPAN))
    outputs.append(runner.run_step(cache, states(runner, 2, 3), 66, SPAN, row_order=[1, 0]))
    return torch.cat(outputs, dim=1), cache


def test_a_session_is_the_same_as_on_one_device(runners: tuple[BlockRunner, BlockRunner]):
    (wanted, _), (found, cache) = session(runners[0]), session(runners[1])
    assert torch.equal(found, wanted)
    layout = cache.layout()
    assert layout is not None
    copied = runners[1].new_cache(2, 200)
    copied.append_tokens(cache.read_tokens(0, 69), layout)
    more = states(runners[1], 2, 2)
    assert torch.equal(runners[1].run_step(copied, more, 69, SPAN), runners[1].run_step(cache, more, 69, SPAN))


def test_sessions_decode_together_and_prefixes_are_kept(runners: tuple[BlockRunner, BlockRunner]):
    outputs = []
    for runner in runners:
        batches = BatchRunner(runner)
        assert batches.joining is not Joining.ALONE
        caches = [runner.new_cache(1, 100) for _ in range(2)]
        for cache in caches:
            runner.run_step(cache, states(runner, 1, PAGE_TOKENS), 0, SPAN)
        caches[1] = runner.new_cache(1, 100)
        caches[1].write_pages([caches[0].read_page(0)])
        steps = [DecodeStep(cache, states(runner, 1, 1), PAGE_TOKENS, SPAN) for cache in caches]
        outputs.append(batches.run(steps))
    for found, wanted in zip(outputs[1], outputs[0], strict=True):
        assert isinstance(found, torch.Tensor)
        assert isinstance(wanted, torch.Tensor)
        assert torch.equal(found, wanted)


# --- where it lies


@pytest.fixture(params=["llama", "bloom", "gemma2"])
def half_meta(request: pytest.FixtureRequest, tmp_path: Path) -> BlockRunner:
    """Blocks 0 and 1 on the CPU, 2 and 3 where there are shapes but no values."""
    save_tiny_model(request.param, tmp_path)
    runner = load_blocks(open_checkpoint(str(tmp_path)), SPAN, dtype=torch.float32, device=CPU)
    for block in runner.module.blocks[2:]:
        block.to(META)
    runner.module.place((CPU, CPU, META, META))
    return runner


def devices_of(cache: KVCache) -> list[str]:
    return [keys.device.type for keys in cache._keys if keys is not None]


def test_keys_lie_with_their_blocks_and_states_travel(half_meta: BlockRunner):
    cache = half_meta.new_cache(2, 100)
    output = half_meta.run_step(cache, states(half_meta, 2, 70), 0, SPAN)
    output = half_meta.run_step(cache, states(half_meta, 2, 1), 70, SPAN, row_order=[1, 0])
    assert output.device == META
    assert output.shape == (2, 1, half_meta.module.config.hidden_size)
    assert devices_of(cache) == ["cpu", "cpu", "meta", "meta"]
    part = half_meta.new_cache(1, 10, Span(0, 2))
    assert half_meta.run_step(part, states(half_meta, 1, 3), 0, Span(0, 2)).device == CPU


def test_copies_and_pages_come_to_their_blocks_devices(half_meta: BlockRunner):
    cache = half_meta.new_cache(1, 200)
    half_meta.run_step(cache, states(half_meta, 1, PAGE_TOKENS), 0, SPAN)
    layout = cache.layout()
    assert layout is not None
    copied, paged = half_meta.new_cache(1, 200), half_meta.new_cache(1, 200)
    copied.append_tokens(torch.zeros(5, layout.values_per_token(1)), layout)
    paged.write_pages([cache.read_page(0)])
    for each in (copied, paged):
        assert devices_of(each) == ["cpu", "cpu", "meta", "meta"]
        together = BatchCache([each, each])
        for device, block in ((META, 2), (CPU, 0)):
            keys = torch.zeros(2, *_key_shape(each), device=device)
            assert together.update(keys, keys, block)[0].device == device


def _key_shape(cache: KVCache) -> tuple[int, int, int]:
    keys = cache._keys[0]
    assert keys is not None
    return keys.shape[1], 1, keys.shape[3]


# --- a node


async def test_a_worker_splits_its_span_and_says_what_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    save_tiny_model("llama", tmp_path)
    worker = ComputeWorker(num_threads=1)
    caplog.set_level("INFO")
    try:
        model = await worker.open_model(ModelChoice(str(tmp_path)), device="cpu,cpu", dtype="float32")
        assert [room.name for room in model.rooms] == ["cpu", "cpu"]
        loaded = await worker.load(model, SPAN, "cpu,cpu", None)
        assert "blocks by device: 2 on cpu, 2 on cpu" in caplog.text
        assert loaded.free_bytes > 0
        assert len((await worker.unload(model, "cpu,cpu")).rooms) == 2
    finally:
        worker.close()


def test_what_computes_is_the_same_on_one_device_or_two(tmp_path: Path):
    save_tiny_model("llama", tmp_path)
    kernels = [
        open_model(ModelChoice(str(tmp_path)), device, "float32", "none").kernels for device in ("cpu", "cpu,cpu")
    ]
    assert kernels == ["cpu", "cpu"]
