"""What a CUDA node's quantized layers compute; bitsandbytes computes the same on a CPU, which these tests choose."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from server_node.compute import bitsandbytes_layers, block_loader, opened_model, quantization
from server_node.compute.batch_runner import BatchRunner, Joining
from server_node.compute.bitsandbytes_layers import BitsAndBytes, plain_weight
from server_node.compute.block_loader import load_blocks, module_bytes
from server_node.compute.block_runner import BlockRunner
from server_node.compute.opened_model import open_model
from server_node.compute.packed_linears import pack_linears
from server_node.compute.quantization import Quantizer, quantized_bytes, scheme_of
from server_node.config import ModelChoice
from swarm_protocol.errors import ConfigError
from swarm_protocol.model import open_checkpoint
from swarm_protocol.model.few_rows import speed_up
from swarm_protocol.spans import Span
from tests.tiny_models import save_tiny_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SPAN = Span(1, 4)
KINDS = [BitsAndBytes("int8"), BitsAndBytes("nf4")]
ERRORS = {"int8": 0.02, "nf4": 0.12}
"""Of a product with random weights, in the mean and relative to its size."""

pytestmark = pytest.mark.parametrize("held", KINDS, ids=lambda held: held.kind)


def pair(held: BitsAndBytes, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Linear, Any]:
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], dtype=dtype).requires_grad_(False)
    return linear, held.layer(copy.deepcopy(linear)).eval()


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(320, 256), (70, 100), (5, 704)])
def test_a_layer_gives_the_product_with_its_numbers(held: BitsAndBytes, shape: tuple[int, int], dtype: torch.dtype):
    linear, layer = pair(held, shape, dtype)
    plain = plain_weight(layer)
    assert plain.shape == shape
    assert distance(plain, linear.weight) <= ERRORS[held.kind]
    for rows in (torch.randn(1, 1, shape[1]), torch.randn(2, 9, shape[1])):
        with torch.inference_mode():
            found = layer(rows.to(dtype))
        wanted = functional.linear(rows, plain.float(), linear.bias.float())
        assert (found.dtype, found.shape) == (dtype, wanted.shape)
        # Rows are rounded to 8 bits as well, where weights are.
        assert distance(found, wanted) <= (0.02 if held.kind == "int8" else 0.01)
    assert layer(torch.empty(1, 0, shape[1], dtype=dtype)).shape == (1, 0, shape[0])


def test_a_weight_that_goes_through_in_pieces_is_the_same(held: BitsAndBytes, monkeypatch: pytest.MonkeyPatch):
    _, whole = pair(held, (300, 128))
    monkeypatch.setattr(bitsandbytes_layers, "_PIECE_BYTES", 2 * 128 * 64)
    _, pieced = pair(held, (300, 128))
    assert torch.equal(plain_weight(whole), plain_weight(pieced))


def test_outliers_keep_their_16_bits(held: BitsAndBytes):
    linear, layer = pair(held, (320, 256))
    rows = torch.randn(4, 256).bfloat16()
    rows[:, 7] = 300.0
    with torch.inference_mode():
        assert distance(layer(rows), linear(rows)) <= ERRORS[held.kind]


def test_gradients_of_the_input_are_those_of_the_quantized_weight(held: BitsAndBytes):
    _, layer = pair(held, (320, 256))
    with torch.inference_mode():
        layer(torch.randn(1, 1, 256).bfloat16())
    rows = torch.randn(2, 3, 256).bfloat16().requires_grad_()
    output = layer(rows)
    gradients = torch.randn_like(output)
    output.backward(gradients)
    assert distance(rows.grad, gradients.float() @ plain_weight(layer).float()) <= 0.01
    assert all(not parameter.requires_grad for parameter in layer.parameters() if parameter is not layer.bias)


def test_bytes_are_known_before_and_after_the_first_forward(held: BitsAndBytes):
    block = nn.Sequential(nn.Linear(256, 300), nn.Linear(300, 257), nn.Linear(8, 8)).to(torch.bfloat16)
    wanted = quantized_bytes(block, held)
    quantizer = Quantizer(held)
    quantizer(block)
    assert quantizer.num_layers == 2
    assert module_bytes(block) == wanted
    with torch.inference_mode():
        block[:2](torch.randn(3, 256).bfloat16())
    assert module_bytes(block) == wanted


def test_what_makes_plain_layers_fast_leaves_them_alone(held: BitsAndBytes):
    block = nn.Sequential(nn.Linear(256, 256)).requires_grad_(False)
    Quantizer(held)(block)
    layer = block[0]
    assert pack_linears(block, keeps_plain=True) + speed_up(block) == 0
    assert block[0] is layer


# --- spans


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    save_tiny_model("llama", folder, "50MB", hidden_size=256, intermediate_size=700, num_key_value_heads=4)
    return folder


@pytest.fixture(scope="module")
def runners(large: Path) -> dict[str, BlockRunner]:
    checkpoint = open_checkpoint(str(large))
    return {held.kind: load_blocks(checkpoint, SPAN, dtype=torch.bfloat16, device=CPU, scheme=held) for held in KINDS}


def with_plain_weights(runner: BlockRunner) -> BlockRunner:
    """Return a copy in float32 whose quantized layers are `nn.Linear` with the same numbers."""
    module = copy.deepcopy(runner.module)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child.weight.element_size() == 1:
                linear = nn.Linear(child.in_features, child.out_features, bias=False)
                linear.weight = nn.Parameter(plain_weight(child).float(), requires_grad=False)
                setattr(parent, name, linear)
    return BlockRunner(module.float())


def test_a_span_computes_with_the_quantized_numbers(held: BitsAndBytes, runners: dict[str, BlockRunner]):
    states = torch.randn(2, 9, 256, generator=torch.Generator().manual_seed(1))
    outputs = []
    for runner in (runners[held.kind], with_plain_weights(runners[held.kind])):
        cache = runner.new_cache(2, 16, SPAN)
        parts = [runner.run_step(cache, states[:, :8], 0, SPAN), runner.run_step(cache, states[:, 8:], 8, SPAN)]
        outputs.append(torch.cat(parts, dim=1).float())
    # Three blocks of random weights amplify what bfloat16, and 8 bits of activations, round.
    assert distance(*outputs) <= 0.15


def test_gradients_flow_through_a_span(held: BitsAndBytes, runners: dict[str, BlockRunner]):
    states = torch.randn(1, 5, 256, dtype=torch.bfloat16, requires_grad=True)
    runners[held.kind].forward(states, SPAN).sum().backward()
    assert states.grad is not None
    assert 0 < states.grad.norm() < float("inf")


def test_sessions_decode_together(held: BitsAndBytes, runners: dict[str, BlockRunner]):
    assert BatchRunner(runners[held.kind]).joining is Joining.PADDED


def test_a_block_is_quantized_before_the_next_one_is_read(
    held: BitsAndBytes, large: Path, monkeypatch: pytest.MonkeyPatch
):
    sizes: list[tuple[int, int]] = []

    class Watching(Quantizer):
        def __call__(self, block: nn.Module) -> None:
            plain_bytes = module_bytes(block)
            super().__call__(block)
            sizes.append((plain_bytes, module_bytes(block)))

    monkeypatch.setattr(block_loader, "Quantizer", Watching)
    runner = load_blocks(open_checkpoint(str(large)), SPAN, dtype=torch.bfloat16, device=CPU, scheme=held)
    assert len(sizes) == len(SPAN)
    # Each is there as it is in the file until it is its turn, and none of it afterwards.
    assert all(quantized_bytes < 0.53 * plain_bytes for plain_bytes, quantized_bytes in sizes)
    assert [module_bytes(block) for block in runner.module.blocks] == [after for _, after in sizes]


# --- what a node makes of it


@pytest.fixture
def as_on_cuda(held: BitsAndBytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened_model, "scheme_of", lambda *_: held)


@pytest.mark.usefixtures("as_on_cuda")
def test_what_blocks_will_take_is_known_before_they_are_read(held: BitsAndBytes, large: Path):
    opened = open_model(ModelChoice(str(large)), "cpu", "bfloat16", held.kind)
    runner = load_blocks(opened.checkpoint, SPAN, dtype=opened.dtype, device=CPU, scheme=opened.scheme)
    assert module_bytes(runner.module.blocks) == len(SPAN) * opened.block_bytes
    assert opened.loading_bytes > opened.block_bytes
    assert opened.kernels == f"bnb-{held.kind}/cpu"


def test_cuda_gets_them_and_a_cpu_does_not(held: BitsAndBytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(BitsAndBytes, "check", lambda *_: None)
    assert scheme_of(held.kind, CUDA) == held
    packed = scheme_of(held.kind, CPU)
    assert packed is not None
    assert packed.label != held.label


def test_a_device_that_computes_it_passes_the_check(held: BitsAndBytes):
    held.check(CPU)


def test_wrong_products_are_refused(held: BitsAndBytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bitsandbytes_layers, "plain_weight", lambda layer: 1.1 * plain_weight(layer))
    with pytest.raises(ConfigError, match=f"cannot do --quantization {held.kind} on cpu: off by 0"):
        held.check(CPU)


def test_a_machine_without_the_library_is_told_how_to_get_it(held: BitsAndBytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"pip install 'umbel\[node\]'"):
        held.check(CPU)


def test_other_devices_are_refused_with_a_hint(held: BitsAndBytes):
    with pytest.raises(ConfigError, match=r"for CPUs and CUDA, not for mps: .*--dtype bfloat16"):
        quantization.scheme_of(held.kind, torch.device("mps"))
