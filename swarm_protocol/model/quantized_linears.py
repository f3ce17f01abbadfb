"""Linear layers whose weights are held in 8 bits (`int8`) and in 4 (`nf4`), multiplied on a CPU.

In 16 bits, few rows are multiplied by torch's packed products, and many by a weight that is turned back into plain
numbers piece by piece, from the number of rows on that was measured to be faster. In float32 those products are too
slow, and all rows take the second way, so that a row's result depends on the others by no more than the order of sums.
What a CPU makes of `nf4` is no NF4: groups of 4-bit integers with a scale and a zero each, which is what torch has
products for.
"""

import copy
import logging
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from swarm_protocol.model.few_rows import best_s
from swarm_protocol.model.quantized_weights import Int4Groups, Int8Rows, Scheme, packed_weight, pieces

_log = logging.getLogger(__name__)

SCHEMES: Mapping[str, type[Int8Rows] | type[Int4Groups]] = {"int8": Int8Rows, "nf4": Int4Groups}
"""By their names."""

_MIN_WEIGHTS = 1 << 16
"""Smaller layers cost the call, not the reading, and are often what a model is most sensitive to."""

_ROW_COUNTS = (1, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Rows that are measured. Packed products take time for each row from four on, plain ones first for the weight."""

_SAMPLE_ROWS = 1024
"""Output rows to measure with; there is nothing to be seen in more of them."""

_MAX_ERROR = 0.02
"""Of torch's packed product against plain numbers, relative to the largest value; bfloat16 is off by 0.004."""


def scheme_named(name: str) -> Scheme | None:
    """Return the scheme of `SCHEMES`, None if this CPU or this torch has no products for it."""
    scheme: Scheme = SCHEMES[name]()
    return scheme if _works(scheme) else None


class QuantizedLinear(nn.Module):
    """Stands for an `nn.Linear`. Its packed weight is a parameter, so that whoever counts bytes or asks for a device
    finds it; `weight` and `plain` are made anew each time."""

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, scheme: Scheme) -> None:
        """Take the bias of `linear`, and its weight packed by `scheme`."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("bias", linear.bias)
        packed, scales = packed_weight(linear.weight, scheme, linear.weight.dtype)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.train(linear.training)
        self.scheme = scheme
        self.max_packed_rows = 0
        """More rows than these are multiplied with plain numbers."""

    @property
    def weight(self) -> torch.Tensor:
        """The weight (out, in) that the packed one stands for."""
        return self.scheme.plain(self.packed, self.scales)[: self.out_features, : self.in_features]

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name for it
        """Return the product with the bias added; gradients flow to the input."""
        rows = input.reshape(-1, self.in_features)
        if torch.is_grad_enabled() and rows.requires_grad:
            product: torch.Tensor = _Product.apply(rows, self)  # type: ignore[no-untyped-call]
        else:
            product = self.product(rows)
        if self.bias is not None:
            product = product + self.bias
        return product.view(*input.shape[:-1], self.out_features)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """Return `rows` (n, in) times the weight: (n, out), contiguous. No gradients."""
        missing = -self.in_features % self.scheme.in_multiple
        rows = functional.pad(rows, (0, missing)) if missing else rows.contiguous()
        few = 0 < rows.shape[0] <= self.max_packed_rows
        product = self.scheme.product(rows, self.packed, self.scales) if few else self._plain_product(rows)
        return product[:, : self.out_features].contiguous()

    def backward_product(self, gradients: torch.Tensor) -> torch.Tensor:
        """Return the gradients of rows (n, in) for those of their products (n, out)."""
        found = torch.zeros(gradients.shape[0], self.in_features, dtype=torch.float32)
        for part in self._pieces():
            weight = self.scheme.plain(*self.scheme.part(self.packed, self.scales, part))
            found += gradients[:, part] @ weight[: self.out_features - part.start, : self.in_features]
        return found.to(gradients.dtype)

    def _plain_product(self, rows: torch.Tensor) -> torch.Tensor:
        parts = (self.scheme.part(self.packed, self.scales, part) for part in self._pieces())
        products = [self.scheme.plain_product(rows, packed, scales) for packed, scales in parts]
        return products[0] if len(products) == 1 else torch.cat(products, dim=1)

    def _pieces(self) -> list[slice]:
        # Filled up rows are at the end of the last piece.
        return list(pieces(self.packed.shape[0], self.in_features, self.scales.dtype))


class _Product(torch.autograd.Function):
    """A product whose backward pass makes the plain weight anew: to keep it would take what quantizing has saved."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer = layer
        return layer.product(rows)

    @staticmethod
    def backward(ctx: Any, gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.layer.backward_product(gradients), None


class PackedLayers:
    """Makes packed layers of plain ones.

    The ways of each shape are measured, which takes some hundredths of a second, with as many threads as the layers
    will run with.
    """

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme
        self._max_packed_rows: dict[tuple[object, ...], int] = {}

    def __call__(self, linear: nn.Linear) -> nn.Module:
        """Return what stands for `linear`."""
        layer = QuantizedLinear(linear, self._scheme)
        key = (layer.in_features, layer.out_features, layer.scales.dtype)
        if key not in self._max_packed_rows:
            self._max_packed_rows[key] = _measured_rows(layer)
            _log.debug("layers of %d to %d: packed up to %d rows", *key[:2], self._max_packed_rows[key])
        layer.max_packed_rows = self._max_packed_rows[key]
        return layer


def replace_linears(block: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> int:
    """Put what `make` returns in the place of every large linear layer inside of `block`; return how many."""
    found = [(parent, name) for parent in block.modules() for name, child in parent.named_children()
             if is_eligible(child) and not next(child.parameters()).is_meta]  # fmt: skip
    for parent, name in found:
        # Nothing else may hold the plain weight by now.
        setattr(parent, name, make(getattr(parent, name)))
    return len(found)


def is_eligible(module: nn.Module) -> bool:
    """Whether `module` is a linear layer that is large enough; it may be on the meta device."""
    kind: Any = type(module)
    return (
        isinstance(module, nn.Linear)
        and module.weight is not None
        and module.weight.is_floating_point()
        and module.weight.numel() >= _MIN_WEIGHTS
        and _is_plain(kind)
    )


@cache
def _is_plain(kind: Any) -> bool:
    """Whether a class computes what `nn.Linear` does; families have subclasses that do, and some that do not."""
    if kind is nn.Linear:
        return True
    weight, bias, rows = (
        torch.rand(shape, generator=torch.Generator().manual_seed(0)) for shape in ((3, 2), (3,), (4, 2))
    )
    plain = nn.Linear(2, 3, device="meta")
    plain.weight, plain.bias = nn.Parameter(weight), nn.Parameter(bias)
    module: nn.Module = copy.copy(plain)
    try:
        module.__class__ = kind
        with torch.inference_mode():
            return torch.allclose(module(rows), plain(rows), rtol=1e-5)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return False


def _measured_rows(layer: QuantizedLinear) -> int:
    """Return up to how many rows the packed product is faster than plain numbers."""
    if layer.scales.dtype == torch.float32:
        return 0  # its packed products are loops without vectors: 5 and 50 times slower
    scheme = layer.scheme
    packed, scales = scheme.part(layer.packed.detach(), layer.scales.detach(), slice(_SAMPLE_ROWS))
    packed, scales = packed.contiguous(), scales.contiguous()
    width = layer.in_features + -layer.in_features % scheme.in_multiple
    rows = torch.randn(_ROW_COUNTS[-1], width, generator=torch.Generator().manual_seed(0)).to(scales.dtype)
    fastest = 0
    with torch.inference_mode():
        for count in _ROW_COUNTS:
            few = rows[:count]
            packed_s = best_s(partial(scheme.product, few, scales=scales), [packed])
            plain_s = best_s(partial(scheme.plain_product, few, scales=scales), [packed])
            if packed_s > plain_s:
                break
            fastest = count
    return fastest


def _works(scheme: Scheme) -> bool:
    """Whether this torch has the products, and they are of the numbers that the weights were packed from."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator)
    rows = torch.randn(5, 64, generator=generator).bfloat16()
    try:
        packed, scales = packed_weight(weight, scheme, torch.bfloat16)
        with torch.inference_mode():
            found = scheme.product(rows, packed, scales).float()
            wanted = functional.linear(rows.float(), scheme.plain(packed, scales).float())
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return bool((found - wanted).abs().max() <= _MAX_ERROR * wanted.abs().max())
