"""Packed layers compute what torch's own do, hold their weights once, and are only there where they gain."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import OlmoConfig, OlmoForCausalLM

from server_node.compute import packed_linears
from server_node.compute.block_runner import BlockRunner
from server_node.compute.packed_linears import PackedLinear, Packing, pack_linears
from swarm_protocol.model.checkpoint import open_checkpoint
from swarm_protocol.model.few_rows import Way
from swarm_protocol.model.parts import load_span
from swarm_protocol.spans import Span


def layer(bias: bool = True, shape: tuple[int, int] = (320, 256)) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(shape[1], shape[0], bias=bias).requires_grad_(False)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine measures, packing looks like a gain."""
    monkeypatch.setattr(packed_linears, "_MIN_GAIN", 0.0)
    monkeypatch.setattr(packed_linears, "_MAX_LOSS", float("inf"))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "packing", [Packing(True, {}), Packing(False, {}), Packing(True, {1: Way(2, True), 3: Way(3)})]
)
@pytest.mark.parametrize("shape", [(1, 1, 256), (3, 1, 256), (1, 4, 256), (2, 37, 256), (256,), (1, 0, 256)])
def test_a_packed_layer_gives_the_plain_product(bias: bool, packing: Packing, shape: tuple[int, ...]) -> None:
    linear = layer(bias)
    packed = PackedLinear(linear, packing)
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = packed(rows)
        assert found.is_contiguous()
        torch.testing.assert_close(found, linear(rows), rtol=1e-5, atol=1e-6)
        # Rows that lie apart in memory, as a slice of a batch does.
        apart = torch.randn(4, 3, 256)[:, 1:2]
        torch.testing.assert_close(packed(apart), linear(apart), rtol=1e-5, atol=1e-6)


def test_the_plain_weight_is_kept_only_for_rows_that_take_it() -> None:
    linear = layer()
    packed = PackedLinear(linear, Packing(True, {}))
    assert packed.packed_bytes == packed_linears.packed_bytes(nn.Sequential(packed)) == linear.weight.nbytes
    assert [name for name, _ in packed.named_parameters()] == ["bias"]
    assert torch.equal(packed.plain_weight, linear.weight)
    kept = PackedLinear(linear, Packing(True, {1: Way(1)}))
    assert kept.plain_weight.data_ptr() == linear.weight.data_ptr()


@pytest.mark.parametrize("packing", [Packing(True, {}), Packing(True, {1: Way(2, True)})])
def test_gradients_flow_to_the_input(packing: Packing) -> None:
    linear = layer()
    rows = torch.randn(3, 256, requires_grad=True)
    PackedLinear(linear, packing)(rows).sum().backward()
    torch.testing.assert_close(rows.grad, linear.weight.sum(0).expand(3, -1))


@pytest.mark.parametrize("keeps_plain", [True, False])
def test_large_float32_layers_are_packed_in_place(always: None, keeps_plain: bool) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Sequential(layer(), layer(False)), layer().to(torch.bfloat16))
    rows = torch.randn(5, 256)
    wanted = module[1][0](rows)
    assert pack_linears(module, keeps_plain=keeps_plain) == 2
    assert [type(child) for child in (module[0], module[2])] == [nn.Linear, nn.Linear]
    assert isinstance(module[1][0], PackedLinear)
    with torch.inference_mode():
        torch.testing.assert_close(module[1][0](rows), wanted, rtol=1e-5, atol=1e-6)


def test_nothing_is_packed_where_nothing_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linears, "_MIN_GAIN", float("inf"))
    module = nn.Sequential(layer())
    assert pack_linears(module, keeps_plain=True) == 0
    assert type(module[0]) is nn.Linear


def test_nothing_is_packed_where_the_numbers_differ(always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = packed_linears._product
    monkeypatch.setattr(packed_linears, "_product", lambda *args: right(*args) * 1.01)
    assert pack_linears(nn.Sequential(layer()), keeps_plain=False) == 0


def test_nothing_is_packed_by_a_torch_without_the_operators(always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linears, "_mkldnn", lambda: object())
    assert pack_linears(nn.Sequential(layer()), keeps_plain=False) == 0


def test_a_span_of_which_every_weight_is_packed_still_runs(tmp_path: Path, always: None) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    OlmoForCausalLM(OlmoConfig(vocab_size=64, num_key_value_heads=4, **sizes)).save_pretrained(tmp_path)
    span = Span(0, 2)
    module = load_span(open_checkpoint(str(tmp_path)), span, dtype=torch.float32, device=torch.device("cpu"))
    runner, states = BlockRunner(module), torch.randn(1, 3, 256)
    with torch.inference_mode():
        before = runner.forward(states, span)
        assert pack_linears(module, keeps_plain=False) == 14
        assert not list(module.parameters())
        torch.testing.assert_close(runner.forward(states, span), before, rtol=1e-4, atol=1e-5)
