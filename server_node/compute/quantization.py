"""Linear layers of a node whose weights are quantized in 8 bits (`int8`) and in 4 (`nf4`).

Layers are replaced block by block while a span is loaded: on CUDA by bitsandbytes' (`bitsandbytes_layers.py`), on a CPU
by packed ones (`swarm_protocol/model/quantized_linears.py`).
"""

from typing import TypeAlias

import torch
from torch import nn

from server_node.compute.bitsandbytes_layers import BitsAndBytes
from swarm_protocol.errors import ConfigError
from swarm_protocol.model.quantized_linears import SCHEMES, PackedLayers, is_eligible, replace_linears, scheme_named
from swarm_protocol.model.quantized_weights import Scheme

Held: TypeAlias = Scheme | BitsAndBytes
"""How weights are held: by the products of this file, or by bitsandbytes'."""


def scheme_of(quantization: str, device: torch.device) -> Held | None:
    """Return how weights are held for a value of `--quantization`, None for `none`.

    Raises ConfigError for a device, a CPU or a torch that cannot do it.
    """
    if quantization == "none":
        return None
    if quantization not in SCHEMES:
        raise ConfigError(f"--quantization is none, {' or '.join(SCHEMES)}, not {quantization!r}")
    if device.type == "cuda":
        held = BitsAndBytes("int8" if quantization == "int8" else "nf4")
        held.check(device)
        return held
    if device.type != "cpu":
        raise ConfigError(
            f"--quantization {quantization} is for CPUs and CUDA, not for {device.type}: "
            f"leave it out, and choose --dtype bfloat16 or float16 to save memory"
        )
    scheme = scheme_named(quantization)
    if scheme is None:
        raise ConfigError(f"torch {torch.__version__} has no products for --quantization {quantization} on this CPU")
    return scheme


class Quantizer:
    """Replaces the large linear layers of blocks, one after the other; `num_layers` counts them.

    Only the compute thread may use it, with as many threads as the layers will run with.
    """

    def __init__(self, scheme: Held) -> None:
        self.scheme = scheme
        self.num_layers = 0
        self._make = scheme.layer if isinstance(scheme, BitsAndBytes) else PackedLayers(scheme)

    def __call__(self, block: nn.Module) -> None:
        """Quantize what is inside of `block`, in place and layer by layer."""
        self.num_layers += replace_linears(block, self._make)


def quantized_bytes(block: nn.Module, scheme: Held) -> int:
    """Return what a block's weights and buffers will take once it is quantized; it may be on the meta device."""
    size_bytes = sum(tensor.nbytes for tensor in (*block.parameters(), *block.buffers()))
    for module in block.modules():
        if isinstance(module, nn.Linear) and is_eligible(module):
            weight = module.weight
            packed_bytes = scheme.size_bytes(module.out_features, module.in_features, weight.dtype)
            size_bytes += packed_bytes - weight.nbytes
    return size_bytes
