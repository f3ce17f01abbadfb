"""Linear layers of a CUDA device whose weights are quantized by bitsandbytes: `int8` is LLM.int8(), `nf4` is QLoRA's.

Activations are quantized as well with `int8`, each row by itself; columns that hold an outlier in any row of a batch go
through in 16 bits (LLM.int8(), arXiv:2208.07339), so that a row's rounding may depend on the others. `nf4` rounds
weights only, in blocks of 64 whose scales are quantized again (QLoRA, arXiv:2305.14314). Nothing here asks for CUDA:
the library computes the same on a CPU, slowly.
"""

import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from swarm_protocol.errors import ConfigError

_OUTLIER = 6.0
"""Activations beyond it keep 16 bits; the threshold of LLM.int8(), found with models from 6.7 billion weights on."""

_BLOCK = 64
"""Weights that share a scale in `nf4`."""

_SCALES_BLOCK = 256
"""Scales that share a scale of their own."""

_NF4_TABLES_BYTES = 16 * 4 + 256 * 4 + 4
"""What the numbers stand for, those of the scales, and the scales' mean."""

_PIECE_BYTES = 64 * 1024 * 1024
"""Of a weight in float16, which int8 is made from piece by piece; rows are independent."""

_MAX_ERROR = {"int8": 0.03, "nf4": 0.03}
"""Of a product against the plain one with the same numbers, relative to the largest value. Activations in 8 bits are
off by 0.005."""


@dataclass(frozen=True, slots=True)
class BitsAndBytes:
    """How bitsandbytes holds weights; `label` is for a record's numerics."""

    kind: Literal["int8", "nf4"]

    @property
    def label(self) -> str:
        return f"bnb-{self.kind}"

    def layer(self, linear: nn.Linear) -> nn.Module:
        """Return the library's layer with the quantized weight of `linear`, on its device, and the same bias."""
        layer: nn.Module = _int8_layer(linear) if self.kind == "int8" else _nf4_layer(linear)
        layer.bias = linear.bias
        # Else transformers takes the layer for one that no file had, and draws weights for it.
        for part in (layer, *layer.parameters()):
            part._is_hf_initialized = True  # type: ignore[attr-defined]
        return layer.train(linear.training)

    def size_bytes(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Return what a weight of so many outputs and inputs takes, of any `dtype`."""
        num_weights = out_features * in_features
        if self.kind == "int8":
            return num_weights + 4 * out_features
        num_scales = -(-num_weights // _BLOCK)
        return (num_weights + 1) // 2 + num_scales + 4 * -(-num_scales // _SCALES_BLOCK) + _NF4_TABLES_BYTES

    def check(self, device: torch.device) -> None:
        """Raise ConfigError unless the library is installed and computes on `device` what it should."""
        linear = nn.Linear(128, 64, bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)
        linear.weight.copy_(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)))
        rows = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).to(linear.weight)
        try:
            layer = self.layer(linear).eval()
            with torch.inference_mode():
                found = layer(rows).float()
                wanted = functional.linear(rows.float(), plain_weight(layer).float())
            error = ((found - wanted).abs().max() / wanted.abs().max()).item()
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as failure:
            reason = (str(failure).splitlines() or [type(failure).__name__])[0]
            raise ConfigError(f"bitsandbytes cannot do --quantization {self.kind} on {device}: {reason}") from failure
        if not error <= _MAX_ERROR[self.kind]:
            raise ConfigError(f"bitsandbytes cannot do --quantization {self.kind} on {device}: off by {error:.2g}")


def plain_weight(layer: Any) -> torch.Tensor:
    """Return the weight (out, in) that a layer's quantized one stands for, in float32, float16 or the layer's dtype."""
    bnb, weight = _library(), layer.weight
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        plain: torch.Tensor = bnb.functional.int8_vectorwise_dequant(weight.data, scales)
    else:
        plain = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    return plain


def unlisted_bytes(module: nn.Module) -> int:
    """Return what layers of `module` hold besides their parameters and buffers: the scales of quantized weights."""
    return sum(tensor.nbytes for layer in module.modules() for tensor in _unlisted(layer))


def _unlisted(layer: nn.Module) -> list[torch.Tensor]:
    weight = getattr(layer, "weight", None)
    quantized = getattr(weight, "quant_state", None)
    if quantized is not None:
        inner = quantized.state2
        return [quantized.absmax, quantized.code, quantized.offset, inner.absmax, inner.code]
    scales = getattr(weight, "SCB", None)
    # The first forward moves them from the weight to the layer.
    scales = getattr(getattr(layer, "state", None), "SCB", None) if scales is None else scales
    return [] if scales is None else [scales]


def _int8_layer(linear: nn.Linear) -> Any:
    bnb, weight = _library(), linear.weight.detach()
    packed = torch.empty_like(weight, dtype=torch.int8)
    scales = torch.empty(linear.out_features, dtype=torch.float32, device=weight.device)
    step = max(1, _PIECE_BYTES // 2 // linear.in_features)
    for first in range(0, linear.out_features, step):
        part = slice(first, first + step)
        packed[part], scales[part], _ = bnb.functional.int8_vectorwise_quant(weight[part].contiguous().half())
    layer = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=_OUTLIER, device="meta"
    )
    layer.weight = bnb.nn.Int8Params(packed, requires_grad=False, has_fp16_weights=False, CB=packed, SCB=scales)
    return layer


def _nf4_layer(linear: nn.Linear) -> Any:
    bnb, weight = _library(), linear.weight.detach()
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=weight.dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    # A CPU's own layout is made at the first forward, in place of the one that gradients are computed with.
    layer.support_avx512bf16_for_cpu = False
    plain = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", blocksize=_BLOCK, module=layer)
    layer.weight = plain.to(weight.device)
    return layer


def _library() -> Any:
    """Return bitsandbytes, which takes seconds to import. Raises ConfigError where it is not installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError("quantized blocks on CUDA need bitsandbytes: pip install 'umbel[node]'") from error
    # It warns for each product of bfloat16 rows that int8 is made from float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return bitsandbytes
