"""What does not fit is refused by name when a checkpoint is opened or a part is built, not in a session."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from swarm_protocol.errors import CheckpointError, UnsupportedFamilyError
from swarm_protocol.model import open_checkpoint
from swarm_protocol.model.anatomy import build_empty, find_anatomy, probe_block_result
from swarm_protocol.model.families import check_config
from tests.tiny_models import tiny_config


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bart", "encoder-decoder"),
        ("whisper", "encoder-decoder"),
        ("mamba", "recurrent"),
        ("rwkv", "recurrent"),
        ("recurrent_gemma", "recurrent"),
        ("jamba", "recurrent"),
        ("qwen3_next", "recurrent"),
        ("minimax", "linear_attention"),
        ("llama4_text", "chunked_attention"),
        ("gemma3", "multimodal"),
        ("gemma3n_text", "keys of other blocks"),
        ("vit", "no causal language model"),
    ],
)
def test_families_that_are_no_chain_of_attention_blocks_are_refused(model_type: str, reason: str) -> None:
    with pytest.raises(UnsupportedFamilyError, match=f"{model_type} cannot be cut into spans: .*{reason}"):
        check_config(CONFIG_MAPPING[model_type]())


def _config_file(folder: Path, **fields: Any) -> str:
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


def test_code_of_a_repository_is_never_run(tmp_path: Path) -> None:
    source = _config_file(tmp_path, model_type="chatglm", auto_map={"AutoConfig": "configuration_chatglm.Config"})
    with pytest.raises(UnsupportedFamilyError, match=r"chatglm .*never run"):
        open_checkpoint(source)


def test_an_unknown_family_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFamilyError, match="nobodys_model"):
        open_checkpoint(_config_file(tmp_path, model_type="nobodys_model"))
    with pytest.raises(UnsupportedFamilyError, match="model_type"):
        open_checkpoint(_config_file(tmp_path))


def test_a_config_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFamilyError, match="llama"):
        open_checkpoint(_config_file(tmp_path, model_type="llama", hidden_size="big"))


def test_weights_that_are_quantized_are_refused_by_method(tmp_path: Path) -> None:
    source = _config_file(tmp_path, model_type="llama", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match="gptq"):
        open_checkpoint(source)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(str(tmp_path))


def test_a_table_that_nothing_is_known_of_is_refused() -> None:
    config = CONFIG_MAPPING["biogpt"](hidden_size=32, num_hidden_layers=3, num_attention_heads=4, vocab_size=99)
    with pytest.raises(UnsupportedFamilyError, match=r"biogpt .*embed_positions"):
        find_anatomy(build_empty(config, torch.float32))


def test_a_base_model_that_does_more_than_to_chain_its_blocks_is_refused() -> None:
    model = build_empty(tiny_config("granite"), torch.float32)
    with pytest.raises(UnsupportedFamilyError, match=r"granite .*more than"):
        # Not neutralised, this family multiplies what comes in.
        probe_block_result(model.model, find_anatomy(model), torch.float32, torch.device("cpu"))
