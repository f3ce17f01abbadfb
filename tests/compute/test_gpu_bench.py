"""The benchmark of large blocks on a GPU runs on a CPU with small ones, and its blocks are the family's."""

import pytest
import torch
from torch import nn
from transformers import AutoModel

from bench import gpu
from server_node.compute.bitsandbytes_layers import BitsAndBytes
from server_node.compute.block_loader import module_bytes
from server_node.compute.quantization import Held, quantized_bytes
from swarm_protocol.errors import ConfigError

CPU = torch.device("cpu")
SMALL = gpu.shapes_of("small")


@pytest.mark.parametrize("name", SMALL)
def test_blocks_compute_what_the_familys_model_does(name: str):
    runner = gpu.random_blocks(SMALL[name], None, CPU, None)
    model = AutoModel.from_config(SMALL[name].config, dtype=torch.bfloat16).eval()
    getattr(model, "h" if "bloom" in name else "layers").load_state_dict(runner.module.blocks.state_dict())
    for edge in ("norm", "ln_f", "word_embeddings_layernorm"):
        if hasattr(model, edge):
            setattr(model, edge, nn.Identity())
    states = torch.randn(2, 5, 512).bfloat16()
    with torch.inference_mode():
        wanted = model(inputs_embeds=states).last_hidden_state
    torch.testing.assert_close(runner.forward(states, runner.span), wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("scheme", [BitsAndBytes("int8"), BitsAndBytes("nf4")], ids=lambda held: held.kind)
@pytest.mark.parametrize("name", SMALL)
def test_steps_of_what_a_gpu_would_hold_are_timed(name: str, scheme: Held):
    runner = gpu.random_blocks(SMALL[name], scheme, CPU, 1)
    plain = gpu.random_blocks(SMALL[name], None, CPU, 1)
    assert module_bytes(runner.module.blocks) == quantized_bytes(plain.module.blocks, scheme)
    figures = gpu.measure(runner, [1, 3], bandwidth=1e9, rounds=2)
    assert [figure.num_rows for figure in figures] == [1, 3]
    for figure in figures:
        floor_s = module_bytes(runner.module.blocks) / 1e9
        assert figure.floor_share * figure.block_s == pytest.approx(floor_s)
        assert figure.whole_steps_per_s(10) == pytest.approx(0.1 / figure.block_s)


def test_the_large_shapes_are_those_of_the_models():
    config = gpu.shapes_of("bloom-176b")["bloom-176b"].config
    assert (config.hidden_size, config.n_head, config.n_layer) == (14336, 112, 70)
    config = gpu.shapes_of("llama-3.1-70b")["llama-3.1-70b"].config
    assert (config.hidden_size, config.num_key_value_heads, config.intermediate_size) == (8192, 8, 28672)


def test_the_table_has_a_line_for_each_measurement(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main(["--shape", "small", "--rounds", "1", "--rows", "1", "2", "--blocks", "1", "--quantization", "int8"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 1 of small")]
    assert [line.split("|")[3].strip() for line in lines] == ["1", "2", "1", "2"]


def test_large_shapes_without_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device is here"):
        gpu.main([])


def test_a_device_without_room_for_a_block_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "free_memory_bytes", lambda _: 1_000_000)
    with pytest.raises(ConfigError, match="none fits"):
        gpu.random_blocks(SMALL["small llama"], BitsAndBytes("nf4"), CPU, None)
