import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

from swarm_protocol.errors import BlocksNotServedError, CheckpointError, InvalidRequestError, MaxLengthError
from swarm_protocol.ids import is_model_name
from swarm_protocol.model import build_client_model, load_ends, load_span, open_checkpoint
from swarm_protocol.model.checkpoint import clean_name
from swarm_protocol.spans import Span
from tests.tiny_models import NUM_BLOCKS, save_tiny_model, tiny_model

FLOAT32: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-llama"
    save_tiny_model("llama", path)
    return path


def test_a_sharded_folder_opens_with_name_revision_and_size(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    checkpoint = open_checkpoint(str(folder), progress=lambda done, total: seen.append((done, total)))
    assert checkpoint.name == "tiny-llama"
    assert checkpoint.num_blocks == NUM_BLOCKS
    assert checkpoint.dtype == torch.float32
    assert len(checkpoint.revision) == 16
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert seen[-1][0] == seen[-1][1] == len(seen)
    assert checkpoint.generation_config().eos_token_id == 2


def test_a_span_of_a_single_file_equals_that_of_shards(folder: Path, tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "single", max_shard_size="1GB")
    spans = [load_span(open_checkpoint(str(path)), Span(1, 3), **FLOAT32) for path in (folder, tmp_path / "single")]
    sharded, single = (span.state_dict() for span in spans)
    assert sharded.keys() == single.keys()
    assert all(torch.equal(sharded[name], single[name]) for name in sharded)


def test_only_the_files_of_the_span_are_read(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    checkpoint = open_checkpoint(str(folder))
    needed = {file for name, file in index.items() if ".layers.3." in name}
    for path in folder.glob("*.safetensors"):
        if path.name not in needed:
            path.unlink()
    load_span(checkpoint, Span(3, 4), **FLOAT32)
    with pytest.raises((CheckpointError, FileNotFoundError)):
        load_span(checkpoint, Span(0, 5), **FLOAT32)


def test_the_revision_depends_on_the_content_and_not_on_the_path(folder: Path, tmp_path: Path) -> None:
    revision = open_checkpoint(str(folder)).revision
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert open_checkpoint(str(tmp_path / "elsewhere")).revision == revision
    save_tiny_model("llama", tmp_path / "other", seed=1)
    assert open_checkpoint(str(tmp_path / "other")).revision != revision


def test_weights_are_loaded_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    model = tiny_model("qwen3").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.dtype == torch.bfloat16
    for dtype in (torch.float32, torch.bfloat16):
        span = load_span(checkpoint, Span(0, 2), dtype=dtype, device=torch.device("cpu"))
        assert {weight.dtype for weight in span.parameters()} == {dtype}
        assert span(torch.rand(1, 3, 32, dtype=dtype)).dtype == span.dtype == dtype


def test_loading_reports_progress_by_block(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_span(open_checkpoint(str(folder)), Span(1, 4), **FLOAT32, progress=lambda *counts: seen.append(counts))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_loading_leaves_the_random_numbers_alone(folder: Path) -> None:
    state = torch.random.get_rng_state()
    load_span(open_checkpoint(str(folder)), Span(1, 4), **FLOAT32)
    load_ends(open_checkpoint(str(folder)), **FLOAT32)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_blocks_that_the_model_has_not_are_refused(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(BlocksNotServedError):
        load_span(checkpoint, Span(3, 6), **FLOAT32)
    span = load_span(checkpoint, Span(1, 3), **FLOAT32)
    with pytest.raises(BlocksNotServedError):
        span(torch.rand(1, 1, 32), blocks=Span(0, 2))


def test_tied_ends_share_their_weights(tmp_path: Path) -> None:
    save_tiny_model("llama_tied", tmp_path)
    model = build_client_model(open_checkpoint(str(tmp_path)), torch.nn.Identity(), **FLOAT32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_another_class_of_the_family_gets_a_new_head(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    span = load_span(checkpoint, Span(0, NUM_BLOCKS), **FLOAT32)

    class Blocks(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
            return span(hidden_states)  # type: ignore[no-any-return]

    model = build_client_model(checkpoint, Blocks(), **FLOAT32, model_class=LlamaForSequenceClassification)
    whole = LlamaForSequenceClassification.from_pretrained(folder)
    whole.score.load_state_dict(model.score.state_dict())
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model(ids, use_cache=False).logits, whole(ids).logits)
    assert model.score.weight.std() > 0


def test_threads_share_the_ends(folder: Path) -> None:
    ends = load_ends(open_checkpoint(str(folder)), **FLOAT32)
    ids = [torch.full((1, 3), number) for number in range(4, 68)]

    def round_trip(piece: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states = ends.embed(piece)
        return hidden_states, ends.logits(hidden_states)

    with torch.no_grad():
        alone = [round_trip(piece) for piece in ids]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(round_trip, ids))
    for (wanted, wanted_logits), (found, found_logits) in zip(alone, together, strict=True):
        assert torch.equal(found, wanted)
        torch.testing.assert_close(found_logits, wanted_logits)


def test_the_ends_refuse_ids_and_positions_that_do_not_exist(tmp_path: Path) -> None:
    save_tiny_model("gpt2", tmp_path)
    ends = load_ends(open_checkpoint(str(tmp_path)), **FLOAT32)
    with pytest.raises(InvalidRequestError, match="99"):
        ends.embed(torch.tensor([[1, 99]]))
    with pytest.raises(MaxLengthError):
        ends.embed(torch.tensor([[1, 2]]), 127)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path, max_shard_size="1GB")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_span(open_checkpoint(str(tmp_path)), Span(0, 2), **FLOAT32)
    with pytest.raises(CheckpointError, match=r"2\.mlp\.up_proj"):
        load_span(open_checkpoint(str(tmp_path)), Span(2, 3), **FLOAT32)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path, max_shard_size="1GB")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"2\.mlp\.up_proj"):
        load_span(open_checkpoint(str(tmp_path)), Span(2, 3), **FLOAT32)


def test_a_file_that_was_cut_short_is_refused(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cut short"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b"\x10\0\0\0\0\0\0\0" + b"{" * 16])
def test_files_that_are_no_safetensors_are_refused(tmp_path: Path, content: bytes) -> None:
    save_tiny_model("llama", tmp_path, max_shard_size="1GB")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        open_checkpoint(str(tmp_path))


def test_an_index_that_leads_out_of_the_folder_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "../secret.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="secret"):
        open_checkpoint(str(folder))


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path, max_shard_size="1GB")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("source", ["/no/such/folder", "./nothing", "a b", "missing.gguf", ""])
def test_sources_that_are_nothing_are_refused(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError):
        open_checkpoint(source)


def test_names_are_cleaned() -> None:
    assert clean_name("SmolLM2 135M (chat)") == "SmolLM2-135M-chat"
    assert clean_name("../x") == "x"
    assert clean_name("€") == "model"
    for folder in ("_quantized", "n" * 200, "n" * 127 + ".x", "__", "._-x"):
        assert is_model_name(clean_name(folder))


def test_packed_experts_are_unpacked(tmp_path: Path) -> None:
    model = tiny_model("gpt_oss", intermediate_size=64)
    model.save_pretrained(tmp_path, max_shard_size="1GB")
    tensors = load_file(tmp_path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    wanted = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, rows, columns = tensors.pop(name).shape
        # Stored transposed, in groups of 32 values: 16 bytes of 4-bit floats and a shared power of two.
        blocks = torch.randint(0, 256, (experts, columns, rows // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(125, 130, (experts, columns, rows // 32), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        table = torch.cat([values, -values])
        nibbles = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
        floats = table[nibbles] * 2.0 ** (scales.float() - 127)[..., None]
        wanted[name] = floats.flatten(-2).transpose(1, 2)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    span = load_span(open_checkpoint(str(tmp_path)), Span(0, NUM_BLOCKS), **FLOAT32)
    weights = {f"model.layers.{name.removeprefix('decoder.layers.')}": w for name, w in span.named_parameters()}
    assert wanted
    for name, tensor in wanted.items():
        torch.testing.assert_close(weights[name].detach(), tensor)


class TestHub:
    """A hub repository in a cache, with no network."""

    commit = "0123456789abcdef0123456789abcdef01234567"

    @pytest.fixture
    def cache(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        repository = tmp_path / "cache" / "models--some-org--tiny"
        snapshot = repository / "snapshots" / self.commit
        shutil.copytree(folder, snapshot)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(self.commit)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        return tmp_path / "cache"

    def test_it_opens_by_its_id(self, cache: Path, folder: Path) -> None:
        checkpoint = open_checkpoint("some-org/tiny", cache_dir=str(cache))
        assert checkpoint.name == "some-org/tiny"
        assert open_checkpoint("some-org/tiny", cache_dir=str(cache)).revision == checkpoint.revision
        mine = load_span(checkpoint, Span(1, 3), **FLOAT32).state_dict()
        theirs = load_span(open_checkpoint(str(folder)), Span(1, 3), **FLOAT32).state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)

    def test_shards_that_no_block_of_the_span_is_in_need_not_be_there(self, cache: Path) -> None:
        snapshot = cache / "models--some-org--tiny" / "snapshots" / self.commit
        index = json.loads((snapshot / "model.safetensors.index.json").read_text())["weight_map"]
        whole = open_checkpoint("some-org/tiny", cache_dir=str(cache)).revision
        for path in snapshot.glob("*.safetensors"):
            if path.name not in {file for name, file in index.items() if ".layers.3." in name}:
                path.unlink()
        checkpoint = open_checkpoint("some-org/tiny", cache_dir=str(cache))
        assert checkpoint.revision == whole
        load_span(checkpoint, Span(3, 4), **FLOAT32)
        with pytest.raises(CheckpointError, match="cannot be downloaded"):
            load_span(checkpoint, Span(0, 1), **FLOAT32)

    def test_one_that_is_not_there_is_refused(self, cache: Path) -> None:
        with pytest.raises(CheckpointError, match="neither"):
            open_checkpoint("some-org/other", cache_dir=str(cache))
