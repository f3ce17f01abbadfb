"""Linear layers of a node whose weights are laid out as oneDNN reads them, on a CPU in float32.

A packed weight makes a batch of eight rows nearly as fast as one (2.4 times as fast as torch's own product for the
shapes of BLOOM-560m), and a prefill faster by a tenth to a third. A single row is fastest with the plain weight
(`few_rows.py`), so both are kept where memory is plentiful; else the plain one is dropped, and made anew where
gradients are wanted. As there, nothing is taken on trust: both the numbers and the times of each shape are compared
while loading, and layers that gain nothing stay as they are.

The packing is what torch.compile does with frozen weights (torch/_inductor/fx_passes/mkldnn_fusion.py).
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from swarm_protocol.model.few_rows import MAX_ROWS, Way, best_s, fastest_ways, is_close, is_eligible, sample_of

PADDED_ROWS = 4
"""To what fewer rows are filled up where that is faster: oneDNN has a fast product from here on."""

_MIN_GAIN = 1.1
"""Of a batch of `MAX_ROWS`, to be worth it."""

_MAX_LOSS = 1.25
"""Of a single row, against the fastest way with the plain weight, where that is dropped."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How layers of one shape multiply: `ways` for numbers of rows that take the plain weight, packed else."""

    pads_rows: bool
    ways: Mapping[int, Way]


class PackedLinear(nn.Linear):
    """A linear layer with a packed weight. It cannot be moved to another device or dtype."""

    def __init__(self, linear: nn.Linear, packing: Packing) -> None:
        """Take the bias of `linear`, and its weight where `packing` has ways for it."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("weight", nn.Parameter(linear.weight, requires_grad=False) if packing.ways else None)
        self.register_parameter("bias", linear.bias)
        self.train(linear.training)
        self._packed = _pack(linear.weight)
        self._packing = packing

    @property
    def packed_bytes(self) -> int:
        """What the packed weight takes."""
        return self._packed.nbytes

    @property
    def plain_weight(self) -> torch.Tensor:
        """The weight (out, in), a copy if only the packed one is there."""
        return self._packed.to_dense() if self.weight is None else self.weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name for it
        """Return the product with the bias added; gradients flow to the input."""
        if torch.is_grad_enabled() and input.requires_grad:
            return functional.linear(input, self.plain_weight, self.bias)
        rows = input.reshape(-1, self.in_features)
        num_rows = rows.shape[0]
        way = self._packing.ways.get(num_rows)
        if way is not None:
            product = way.product(rows, self.weight)
            if self.bias is not None:
                product = product + self.bias
        else:
            if self._packing.pads_rows and num_rows < PADDED_ROWS:
                rows = _padded(rows)
            product = _product(rows, self._packed, self.bias)[:num_rows]
        return product.view(*input.shape[:-1], self.out_features)


def pack_linears(module: nn.Module, *, keeps_plain: bool) -> int:
    """Pack the linear layers inside of `module` that gain by it; return how many.

    `keeps_plain` says that weights may be there twice. Takes a few tenths of a second for each shape. To be called with
    as many threads as the layers will run with.
    """
    by_shape: dict[tuple[int, ...], list[tuple[nn.Module, str, nn.Linear]]] = defaultdict(list)
    for parent in module.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear and is_eligible(child):
                by_shape[tuple(child.weight.shape)].append((parent, name, child))
    num_packed = 0
    for layers in by_shape.values():
        packing = _how_to_pack([child.weight for _, _, child in layers], keeps_plain)
        while layers and packing is not None:
            # One by one, so that no more than one of them is there twice on the way.
            parent, name, child = layers.pop()
            setattr(parent, name, PackedLinear(child, packing))
            num_packed += 1
    return num_packed


def packed_bytes(module: nn.Module) -> int:
    """Return what packed weights inside of `module` take."""
    return sum(child.packed_bytes for child in module.modules() if isinstance(child, PackedLinear))


def _how_to_pack(weights: list[torch.Tensor], keeps_plain: bool) -> Packing | None:
    try:
        with torch.inference_mode():
            return _compared(sample_of(weights), keeps_plain)
    except (AttributeError, NotImplementedError, RuntimeError):
        return None  # this torch has no such operators, or they do not take this shape


def _compared(sample: list[torch.Tensor], keeps_plain: bool) -> Packing | None:
    packed = [_pack(weight) for weight in sample]
    rows = torch.randn(MAX_ROWS, sample[0].shape[1], generator=torch.Generator().manual_seed(0))
    if not is_close(_product(rows, packed[0]), functional.linear(rows, sample[0])):
        return None
    plain = fastest_ways(sample)
    counts = (1, 2, 4, MAX_ROWS)
    plain_s = {count: best_s(partial(plain.get(count, Way(count)).product, rows[:count]), sample) for count in counts}
    packed_s = {count: best_s(partial(_product, rows[:count]), packed) for count in counts}
    padded_s = best_s(lambda weight: _product(_padded(rows[:1]), weight), packed)
    pads_rows = padded_s < packed_s[1]
    single_s = min(padded_s, packed_s[1])
    if _MIN_GAIN * packed_s[MAX_ROWS] > plain_s[MAX_ROWS]:
        return None
    if not keeps_plain:
        return Packing(pads_rows, {}) if single_s <= _MAX_LOSS * plain_s[1] else None
    few_s = {1: single_s, 2: min(padded_s, packed_s[2]), 4: packed_s[4]}
    ways = {count: plain.get(count, Way(count)) for count, taken_s in few_s.items() if plain_s[count] < taken_s}
    return Packing(pads_rows, ways)


def _pack(weight: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(mode=False), torch.no_grad():
        packed: torch.Tensor = _mkldnn()._reorder_linear_weight(weight.detach(), MAX_ROWS)
    return packed


def _padded(rows: torch.Tensor) -> torch.Tensor:
    padded = rows.new_zeros(PADDED_ROWS, rows.shape[1])
    padded[: rows.shape[0]] = rows
    return padded


def _product(rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    product: torch.Tensor = _mkldnn()._linear_pointwise(rows, packed, bias, "none", [], "")
    return product


def _mkldnn() -> Any:
    return torch.ops.mkldnn
