"""Weights in 8 and in 4 bits, in the layouts of torch's own products on a CPU (tinygemm, aten/src/ATen/native/cpu).

A scheme packs a weight (out, in), multiplies rows with it in 16 bits, and turns it back into plain numbers, which is
what many rows, float32 and gradients are multiplied with. Each row of a product is computed alone, so it does not
depend on the others.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch.nn import functional

from swarm_protocol.errors import ConfigError

GROUP = 32
"""Weights that share a scale and a zero in 4 bits. Measured with SmolLM2: groups of 64 cost 30 % of perplexity, and are
not faster."""

_NUM_FITS = 3
"""Rounds of fitting; more gain nothing that shows."""

_ROWS = 64
"""Output rows that 4-bit weights are filled up to, and cut at: a multiple of the blocks of every CPU's layout."""

_PIECE_BYTES = 4 * 1024 * 1024
"""Plain numbers that exist at a time: what the caches of a core hold, and little beside a layer of a large model."""

_MIN_PIECE_ROWS = 256
"""Smaller pieces of a wide layer make products of many rows slow."""


class Scheme(Protocol):
    """How weights are held. `label` is for a record's numerics: equal labels hold equal numbers."""

    label: str
    in_multiple: int
    out_multiple: int

    def pack(self, weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float32 weights (out, in) packed, and their scales in `dtype`; sizes are multiples as above."""
        ...

    def part(self, packed: torch.Tensor, scales: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same for some output rows; bounds are multiples of 64."""
        ...

    def product(self, rows: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return contiguous `rows` (n, in), of the scales' dtype and at least one, times the weight: (n, out)."""
        ...

    def plain_product(self, rows: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return the same of any number of rows, through a plain weight that is dropped at once."""
        ...

    def plain(self, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return the weight (out, in) in the scales' dtype."""
        ...

    def size_bytes(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Return what a weight of so many outputs and inputs takes."""
        ...


class Int8Rows:
    """8 bits, one scale for each output row."""

    label = "int8-row"
    # The product in bfloat16 reads 16 numbers at a time and crashes where a row ends in between (torch 2.13).
    in_multiple, out_multiple = 32, 1

    def pack(self, weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        scales = (weight.abs().amax(1) / 127).to(dtype)
        divisors = torch.where(scales > 0, scales, 1).float()
        return torch.round(weight / divisors[:, None]).clamp_(-127, 127).to(torch.int8), scales

    def part(self, packed: torch.Tensor, scales: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return packed[rows], scales[rows]

    def product(self, rows: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = _aten()._weight_int8pack_mm(rows, packed, scales)
        return product

    def plain(self, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return packed.to(scales.dtype).mul_(scales[:, None])

    def plain_product(self, rows: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        if scales.dtype == torch.float16:
            return functional.linear(rows, self.plain(packed, scales))  # without scales the sums are out of range
        numbers = _buffer(packed.numel(), scales.dtype).view(packed.shape).copy_(packed)
        return functional.linear(rows, numbers).mul_(scales)

    def size_bytes(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        return out_features * (_filled(in_features, self.in_multiple) + dtype.itemsize)


class Int4Groups:
    """4 bits, a scale and a zero for each 32 weights of a row, the zero in the middle: (q - 8) * scale + zero."""

    label = f"int4-g{GROUP}"
    in_multiple, out_multiple = GROUP, _ROWS

    def pack(self, weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        groups = weight.view(weight.shape[0], -1, GROUP)
        scales, zeros = (part.to(dtype) for part in _fitted(groups))
        numbers = _rounded(groups, scales.float(), zeros.float()).add_(8)
        packed: torch.Tensor = _aten()._convert_weight_to_int4pack_for_cpu(numbers.to(torch.int32).view_as(weight), 1)
        return packed, torch.stack([scales, zeros], -1).transpose(0, 1).contiguous()

    def part(self, packed: torch.Tensor, scales: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return packed[rows], scales[:, rows]

    def product(self, rows: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = _aten()._weight_int4pack_mm_for_cpu(rows, packed, GROUP, scales)
        return product

    def plain(self, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return _int4_plain(packed, scales, torch.empty(2 * packed.numel(), dtype=scales.dtype))

    def plain_product(self, rows: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return functional.linear(rows, _int4_plain(packed, scales, _buffer(2 * packed.numel(), scales.dtype)))

    def size_bytes(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        num_weights = _filled(out_features, _ROWS) * _filled(in_features, GROUP)
        return num_weights // 2 + num_weights // GROUP * 2 * dtype.itemsize


def _int4_plain(packed: torch.Tensor, scales: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return the weight (out, in), which takes the place of `numbers`."""
    num_groups, out_features, _ = scales.shape
    _int4_layout().unpack_into(numbers.view(-1, out_features), packed)
    groups = numbers.view(num_groups, GROUP, out_features)
    scale, zero = scales[..., 0].contiguous(), scales[..., 1].contiguous()
    torch.addcmul(zero[:, None], groups, scale[:, None], out=groups)
    return groups.view(-1, out_features).t()


def _fitted(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and zeros for groups (out, groups, 32): at first from the extremes, then by least squares.

    Rounding and fitting in turn is how llama.cpp chooses scales, too (ggml-quants.c). Where the numbers were of 4 bits
    before, and in other groups, it costs 12 % of SmolLM2's perplexity and not 20 %.
    """
    low, high = groups.amin(2), groups.amax(2)
    scales, zeros = (high - low) / 15, (7 * low + 8 * high) / 15
    means = groups.mean(2)
    for _ in range(_NUM_FITS):
        numbers = _rounded(groups, scales, zeros)
        means_of_numbers = numbers.mean(2)
        numbers -= means_of_numbers[..., None]
        spread = numbers.square().sum(2)
        scales = torch.where(spread > 0, (numbers * groups).sum(2) / spread.clamp_min(1e-9), scales)
        zeros = means - means_of_numbers * scales
    return scales, zeros


def _rounded(groups: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    divisors = torch.where(scales > 0, scales, 1)
    return torch.round((groups - zeros[..., None]) / divisors[..., None]).clamp_(-8, 7)


@dataclass(frozen=True, slots=True)
class _Int4Layout:
    """Where torch puts the 4-bit numbers of `block` output rows: which of them are the low halves of its bytes."""

    block: int
    low: slice
    high: slice

    def unpack_into(self, numbers: torch.Tensor, packed: torch.Tensor) -> None:
        """Write the numbers less 8, (in, out), of `packed`."""
        in_features, out_features = numbers.shape
        pairs = packed.view(out_features // self.block, in_features, self.block // 2)
        blocks = numbers.view(in_features, out_features // self.block, self.block).transpose(0, 1)
        blocks[..., self.low] = (pairs & 15).view(torch.int8).sub_(8)
        blocks[..., self.high] = (pairs >> 4).view(torch.int8).sub_(8)


@cache
def _int4_layout() -> _Int4Layout:
    """Return the layout that torch chose for this CPU. Raises ConfigError if it is none of the known ones."""
    wanted = torch.arange(_ROWS * GROUP, dtype=torch.int32).view(_ROWS, GROUP)
    # No number of 4 bits says where it comes from, but three of them do.
    digits = [wanted >> shift & 15 for shift in (0, 4, 8)]
    packed = [_aten()._convert_weight_to_int4pack_for_cpu(digit, 1) for digit in digits]
    for block in (64, 32, 16):
        for low, high in ((slice(block // 2), slice(block // 2, None)), (slice(0, None, 2), slice(1, None, 2))):
            layout = _Int4Layout(block, low, high)
            found = torch.empty(GROUP, _ROWS)
            if all(_unpacks(layout, part, digit, found) for part, digit in zip(packed, digits, strict=True)):
                return layout
    raise ConfigError("torch lays 4-bit weights out in an unknown way on this CPU: use --quantization int8")


def _unpacks(layout: _Int4Layout, packed: torch.Tensor, wanted: torch.Tensor, found: torch.Tensor) -> bool:
    layout.unpack_into(found, packed)
    return torch.equal(found.t(), wanted - 8.0)


def packed_weight(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight (out, in) packed, filled up with zeros where the scheme needs it, and its scales in `dtype`.

    Goes through in pieces, so that little is in memory beside both.
    """
    step = max(_ROWS, _PIECE_BYTES // 4 // weight.shape[1] // _ROWS * _ROWS)
    packed, scales = torch.empty(0), torch.empty(0)
    for first in range(0, weight.shape[0], step):
        piece = weight[first : first + step].detach().float()
        missing_in, missing_out = -piece.shape[1] % scheme.in_multiple, -piece.shape[0] % scheme.out_multiple
        if missing_in or missing_out:
            piece = functional.pad(piece, (0, missing_in, 0, missing_out))
        part, part_scales = scheme.pack(piece.contiguous(), dtype)
        if not first:
            rows = _filled(weight.shape[0], scheme.out_multiple)
            packed = part.new_empty(rows, part.shape[1])
            # Those of 4 bits are (groups, out, 2), those of 8 bits (out,).
            axis = part_scales.dim() // 2
            scales = part_scales.new_empty(*part_scales.shape[:axis], rows, *part_scales.shape[axis + 1 :])
        packed[first : first + step] = part
        scheme.part(packed, scales, slice(first, first + step))[1].copy_(part_scales)
    return packed, scales


def _filled(size: int, multiple: int) -> int:
    return size + -size % multiple


def pieces(out_features: int, in_features: int, dtype: torch.dtype) -> Iterator[slice]:
    """Yield which output rows to turn into plain numbers at a time."""
    step = max(_MIN_PIECE_ROWS, _PIECE_BYTES // dtype.itemsize // in_features // _ROWS * _ROWS)
    for first in range(0, out_features, step):
        yield slice(first, min(first + step, out_features))


_buffers = threading.local()
"""For each thread, what plain numbers of a piece are written to, by dtype."""


def _buffer(num_weights: int, dtype: torch.dtype) -> torch.Tensor:
    """Return numbers to write to, which are good until this thread's next call.

    Memory of this size that is taken and given back comes from the system page by page each time, which takes up to ten
    times as long as to fill it.
    """
    name = str(dtype)
    numbers: torch.Tensor | None = getattr(_buffers, name, None)
    if numbers is None or numbers.numel() < num_weights:
        with torch.inference_mode(mode=False):
            numbers = torch.empty(num_weights, dtype=dtype)
        setattr(_buffers, name, numbers)
    return numbers[:num_weights]


def _aten() -> Any:
    return torch.ops.aten
