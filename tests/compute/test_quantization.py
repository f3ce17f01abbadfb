"""Quantized layers compute what their packed numbers say, alone and in company, for every family."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from server_node.compute.batch_runner import BatchRunner, Joining
from server_node.compute.block_loader import load_blocks, module_bytes
from server_node.compute.block_runner import BlockRunner
from server_node.compute.opened_model import open_model
from server_node.compute.packed_linears import pack_linears
from server_node.compute.quantization import Quantizer, quantized_bytes, scheme_of
from server_node.config import ModelChoice
from swarm_protocol.errors import CheckpointError, ConfigError
from swarm_protocol.model import open_checkpoint, quantized_linears, quantized_weights
from swarm_protocol.model.checkpoint import Checkpoint
from swarm_protocol.model.few_rows import speed_up
from swarm_protocol.model.quantized_linears import QuantizedLinear
from swarm_protocol.spans import Span
from tests.tiny_models import TINY_CONFIGS, save_tiny_model

CPU = torch.device("cpu")
KINDS = ["int8", "nf4"]
ERRORS = {"int8": 0.015, "nf4": 0.12}
"""Of a product with random weights, in the mean and relative to its size: a step of the numbers over the square root
of 12, and for int8 the largest of a row's weights over the others."""

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""What a product may be off by from the same in float32, relative to the largest value."""


def quantized(kind: str, shape: tuple[int, int], dtype: torch.dtype = torch.float32, bias: bool = True) -> Any:
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], bias=bias).requires_grad_(False)
    block = nn.Sequential(copy.deepcopy(linear).to(dtype))
    Quantizer(scheme_of(kind, CPU))(block)
    assert isinstance(block[0], QuantizedLinear)
    return linear, block[0]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of any size are quantized."""
    monkeypatch.setattr(quantized_linears, "_MIN_WEIGHTS", 1)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.float() - wanted.float()).abs().max() / wanted.float().abs().max()).item()


# --- one layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(320, 256), (70, 100), (100, 33), (5, 700), (1, 1), (64, 32)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_packed_rows", [0, 64])
def test_a_layer_of_any_shape_gives_the_product_with_its_numbers(
    small: None, kind: str, shape: tuple[int, int], dtype: torch.dtype, max_packed_rows: int
) -> None:
    linear, layer = quantized(kind, shape, dtype)
    layer.max_packed_rows = max_packed_rows
    assert (layer.out_features, layer.in_features) == layer.weight.shape == shape
    # Half a step of the coarsest numbers there are, and of the scales' own rounding.
    steps = {"int8": 254, "nf4": 30}[kind]
    assert (layer.weight - linear.weight).abs().max() <= 1.1 * linear.weight.abs().max() * (2 / steps + 0.01)
    for rows in (torch.randn(1, 1, shape[1]), torch.randn(2, 37, shape[1]), torch.randn(4, 3, shape[1])[:, 1:2]):
        rows = rows.to(dtype)
        wanted = functional.linear(rows.float(), layer.weight.float(), linear.bias)
        with torch.inference_mode():
            found = layer(rows)
        assert (found.dtype, found.shape) == (dtype, wanted.shape)
        assert found.is_contiguous()
        assert relative_error(found, wanted) <= DTYPES[dtype]
    assert layer(torch.empty(1, 0, shape[1], dtype=dtype)).shape == (1, 0, shape[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_quantized_product_is_near_the_exact_one(kind: str, bias: bool) -> None:
    linear, layer = quantized(kind, (512, 1024), bias=bias)
    rows = torch.randn(16, 1024)
    wanted = linear(rows)
    assert ((layer(rows) - wanted).norm() / wanted.norm()).item() <= ERRORS[kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_others(kind: str, dtype: torch.dtype) -> None:
    _, layer = quantized(kind, (320, 256), dtype)
    rows = torch.randn(9, 256).to(dtype)
    if dtype == torch.bfloat16:
        layer.max_packed_rows = 9
    with torch.inference_mode():
        alone = torch.cat([layer(row[None]) for row in rows])
        # Packed products sum up each row alike, plain ones as the library likes.
        assert relative_error(layer(rows), alone) <= (1e-5 if dtype == torch.float32 else 0.0)
        rows[4] = float("nan")
        found = layer(rows)
    assert found[4].isnan().all()
    assert relative_error(found[[0, 3, 5, 8]], alone[[0, 3, 5, 8]]) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_equal_or_zero_stay_as_they_are(kind: str) -> None:
    linear = nn.Linear(256, 256).requires_grad_(False)
    linear.weight.copy_(torch.arange(256)[:, None] / 256)
    layer = QuantizedLinear(linear, scheme_of(kind, CPU))
    torch.testing.assert_close(layer.weight, linear.weight, rtol=1e-6, atol=0)


def test_numbers_that_were_of_4_bits_are_kept(small: None) -> None:
    scales, zeros = torch.rand(64, 8, 1) + 0.5, torch.randn(64, 8, 1)
    numbers = torch.randint(-8, 8, (64, 8, 32), generator=torch.Generator().manual_seed(0))
    numbers[..., 0], numbers[..., 1] = -8, 7
    linear = nn.Linear(256, 64).requires_grad_(False)
    linear.weight.copy_((numbers * scales + zeros).view(64, 256))
    layer = QuantizedLinear(linear, scheme_of("nf4", CPU))
    torch.testing.assert_close(layer.weight, linear.weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(320, 256), (300, 250)])
def test_gradients_of_the_input_are_those_of_the_quantized_weight(kind: str, shape: tuple[int, int]) -> None:
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        _, layer = quantized(kind, shape, dtype)
        rows = torch.randn(2, 3, shape[1], dtype=dtype, requires_grad=True)
        output = layer(rows)
        gradients = torch.randn_like(output)
        output.backward(gradients)
        assert relative_error(rows.grad, gradients.float() @ layer.weight.float()) <= error


def test_wide_layers_go_through_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = quantized("nf4", (1000, 96))
    rows = torch.randn(3, 96, requires_grad=True)
    wanted, (gradients,) = whole(rows), torch.autograd.grad(whole(rows).sum(), rows)
    monkeypatch.setattr(quantized_weights, "_PIECE_BYTES", 96 * 4 * 128)
    monkeypatch.setattr(quantized_weights, "_MIN_PIECE_ROWS", 64)
    for kind in KINDS:
        assert len(list(quantized_weights.pieces(1000, 96, torch.float32))) == 8
        _, layer = quantized(kind, (1000, 96))
        wanted = functional.linear(rows, layer.weight, layer.bias)
        torch.testing.assert_close(layer(rows), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(layer.packed, whole.packed)
    torch.testing.assert_close(torch.autograd.grad(layer(rows).sum(), rows)[0], gradients, rtol=1e-5, atol=1e-6)


def test_the_packed_product_is_taken_up_to_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(quantized_weights.Int8Rows):
        def product(self, rows: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
            for _ in range(1 if rows.shape[0] <= 8 else 200):
                product = super().product(rows, packed, scales)
            return product

    block = nn.Sequential(nn.Linear(512, 512)).bfloat16()
    Quantizer(Slow())(block)
    assert block[0].max_packed_rows <= 8
    _, in_float32 = quantized("int8", (512, 512))
    assert in_float32.max_packed_rows == 0


# --- which layers


class Transposed(nn.Linear):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows @ self.weight.T + (0 if self.bias is None else self.bias)


class Doubled(nn.Linear):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_large_layers_that_compute_what_a_linear_layer_does_are_replaced(kind: str) -> None:
    block = nn.ModuleDict(
        {
            "large": nn.Linear(256, 256),
            "same": Transposed(256, 256),
            "other": Doubled(256, 256),
            "small": nn.Linear(255, 257 - 1),
            "table": nn.Embedding(256, 256),
            "absent": nn.Linear(256, 256, device="meta"),
        }
    )
    wanted_bytes = quantized_bytes(block, scheme_of(kind, CPU))
    quantizer = Quantizer(scheme_of(kind, CPU))
    quantizer(block)
    assert [name for name, child in block.items() if isinstance(child, QuantizedLinear)] == ["large", "same"]
    assert quantizer.num_layers == 2
    packed_bytes = quantizer.scheme.size_bytes(256, 256, torch.float32)
    assert module_bytes(block) == wanted_bytes + block["absent"].weight.nbytes - packed_bytes


def test_what_makes_plain_layers_fast_leaves_quantized_ones_alone() -> None:
    block = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)).requires_grad_(False)
    block[0] = quantized_layer = QuantizedLinear(block[0], scheme_of("int8", CPU))
    rows = torch.randn(8, 256)
    wanted = block(rows)
    assert pack_linears(block, keeps_plain=True) + speed_up(block) <= 1
    assert block[0] is quantized_layer
    with torch.inference_mode():
        torch.testing.assert_close(block(rows), wanted, rtol=1e-5, atol=1e-6)


# --- families


@pytest.fixture(scope="module", params=list(TINY_CONFIGS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_model(request.param, folder)
    return open_checkpoint(str(folder))


SPAN = Span(1, 4)


def with_plain_weights(runner: BlockRunner) -> BlockRunner:
    """Return a copy whose quantized layers are `nn.Linear` with the same numbers."""
    module = copy.deepcopy(runner.module)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantizedLinear):
                linear = nn.Linear(child.in_features, child.out_features, bias=False)
                linear.weight, linear.bias = nn.Parameter(child.weight.contiguous(), requires_grad=False), child.bias
                setattr(parent, name, linear)
    return BlockRunner(module)


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_computes_with_the_quantized_numbers(small: None, family: Checkpoint, kind: str) -> None:
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        runner = load_blocks(family, SPAN, dtype=dtype, device=CPU, scheme=scheme_of(kind, CPU))
        plain = with_plain_weights(runner)
        states = torch.randn(2, 9, runner.module.config.hidden_size, generator=torch.Generator().manual_seed(1))
        outputs = []
        for each in (runner, plain):
            cache = each.new_cache(2, 16, SPAN)
            parts = [each.run_step(cache, states[:, :8], 0, SPAN), each.run_step(cache, states[:, 8:], 8, SPAN)]
            outputs.append(torch.cat(parts, dim=1))
        num_layers = sum(isinstance(module, QuantizedLinear) for module in runner.module.modules())
        assert num_layers or family.config.model_type == "gpt2"  # its layers are none of torch's
        # Not the largest: a row may come to another expert by rounding.
        assert ((outputs[0] - outputs[1]).norm() / outputs[1].norm()).item() <= error


def test_a_model_that_is_incomplete_is_refused_all_the_same(small: None, tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path)
    state = {name: weight for name, weight in model.state_dict().items() if "layers.2.mlp.up_proj" not in name}
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match="incomplete"):
        load_blocks(open_checkpoint(str(tmp_path)), SPAN, device=CPU, scheme=scheme_of("nf4", CPU))


# --- a model whose layers are large enough


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    save_tiny_model("llama", folder, "50MB", hidden_size=256, intermediate_size=700, num_key_value_heads=4)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sessions_decode_together(large: Path, kind: str, dtype: str) -> None:
    runner = load_blocks(
        open_checkpoint(str(large)), SPAN, dtype=getattr(torch, dtype), device=CPU, scheme=scheme_of(kind, CPU)
    )
    assert BatchRunner(runner).joining is Joining.PADDED


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_blocks_will_take_is_known_before_they_are_read(large: Path, kind: str, dtype: str) -> None:
    plain = open_model(ModelChoice(str(large)), "cpu", dtype, "none")
    opened = open_model(ModelChoice(str(large)), "cpu", dtype, kind)
    runner = load_blocks(opened.checkpoint, SPAN, dtype=opened.dtype, device=CPU, scheme=opened.scheme)
    size_bytes = sum(module_bytes(block) for block in runner.module.blocks)
    assert size_bytes == len(SPAN) * opened.block_bytes
    shares = {("int8", "float32"): 0.27, ("int8", "bfloat16"): 0.52, ("nf4", "float32"): 0.2, ("nf4", "bfloat16"): 0.35}
    assert opened.block_bytes < shares[kind, dtype] * plain.block_bytes
    assert opened.loading_bytes == plain.block_bytes
    assert plain.loading_bytes == 0


def test_numerics_name_what_computes(large: Path) -> None:
    kernels = [open_model(ModelChoice(str(large)), "cpu", "auto", kind).kernels for kind in ("none", *KINDS)]
    assert kernels == ["cpu", "int8-row/cpu", "int4-g32/cpu"]


def test_quantized_nodes_run_in_bfloat16_unless_told(large: Path) -> None:
    dtypes = [
        open_model(ModelChoice(str(large)), "cpu", *chosen).dtype
        for chosen in (("auto", "none"), ("auto", "int8"), ("auto", "nf4"), ("float32", "nf4"))
    ]
    assert dtypes == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]


# --- refusals


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match="none, int8 or nf4, not 'int3'"):
        scheme_of("int3", CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_a_torch_without_the_products_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_weights, "_aten", lambda: object())
    with pytest.raises(ConfigError, match=f"no products for --quantization {kind}"):
        scheme_of(kind, CPU)


@pytest.mark.parametrize("scheme", [quantized_weights.Int8Rows, quantized_weights.Int4Groups])
def test_products_that_are_wrong_are_refused(scheme: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = scheme.product
    monkeypatch.setattr(scheme, "product", lambda *args: 1.1 * right(*args))
    with pytest.raises(ConfigError, match="no products"):
        scheme_of("int8" if scheme is quantized_weights.Int8Rows else "nf4", CPU)


def test_an_unknown_layout_of_4_bits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_weights, "_unpacks", lambda *_: False)
    quantized_weights._int4_layout.cache_clear()
    with pytest.raises(ConfigError, match="use --quantization int8"):
        scheme_of("nf4", CPU)
