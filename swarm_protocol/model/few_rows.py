"""Linear layers that are fast for the few rows of a decode step, on a CPU in float32.

A product of one or two rows reads the whole weight for next to no arithmetic. What torch's libraries make of it depends
on the shape, the number of rows and which operand comes first: `weight @ rows.T` streams the weight up to three times
as fast as `rows @ weight.T`, and one row may gain by a second one of zeros. None of that is the same on two machines,
so it is measured where the layers are loaded. The weights stay as they are and where they are.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional

MAX_ROWS = 8
"""More rows are as fast as torch does them: from 12 on, nothing that was tried gained."""

_MIN_WEIGHTS = 1 << 16
"""Smaller layers cost the call, not the reading."""

_SAMPLE_BYTES = 32 * 1024 * 1024
"""Weights of one shape that are read in turn while measuring, so that few of them come from the cache."""

_NUM_TIMINGS = 3
"""The fastest of so many counts: whatever else the machine does makes a way look slower, never faster."""

_MIN_GAIN = 1.1
"""Another way is taken if it is so many times as fast."""

_MAX_ERROR = 1e-4
"""Relative to the largest value; only the order of sums differs, which costs 1e-6."""


@dataclass(frozen=True, slots=True)
class Way:
    """How to multiply: with how many rows, zeros included, and with the weight as the first operand or the second."""

    num_rows: int
    is_weight_first: bool = False

    def product(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return `rows` (n, in) times `weight` (out, in), as (n, out), for n up to `num_rows`."""
        num_rows = rows.shape[0]
        if num_rows < self.num_rows:
            padded = rows.new_zeros(self.num_rows, rows.shape[1])
            padded[:num_rows] = rows
            rows = padded
        if self.is_weight_first:
            return torch.mm(weight, rows.t())[:, :num_rows].t().contiguous()
        return functional.linear(rows, weight)[:num_rows]


class FewRowsLinear(nn.Linear):
    """A linear layer, its weight and bias shared with the one that it is made of."""

    def __init__(self, linear: nn.Linear, ways: Mapping[int, Way]) -> None:
        """`ways` says how to multiply so many rows, where it is not as torch does it."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.train(linear.training)
        self._ways = ways

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name for it
        """Return the product with the bias added; gradients flow as ever."""
        way = self._ways.get(input.numel() // self.in_features)
        if way is None or torch.is_grad_enabled() or not self._fits(input):
            return functional.linear(input, self.weight, self.bias)
        product = way.product(input.reshape(-1, self.in_features), self.weight)
        if self.bias is not None:
            product += self.bias
        return product.view(*input.shape[:-1], self.out_features)

    def _fits(self, rows: torch.Tensor) -> bool:
        # The module may have been moved since it was measured.
        return rows.is_cpu and rows.dtype == torch.float32 == self.weight.dtype


def speed_up(module: nn.Module) -> int:
    """Replace the linear layers inside of `module` that gain by it; return how many.

    Takes a few tenths of a second for each shape. To be called with as many threads as the layers will run with.
    """
    layers = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and is_eligible(child)
    ]
    by_shape: dict[tuple[int, ...], list[torch.Tensor]] = defaultdict(list)
    for _, _, child in layers:
        by_shape[tuple(child.weight.shape)].append(child.weight)
    ways = {shape: fastest_ways(weights) for shape, weights in by_shape.items()}
    num_replaced = 0
    for parent, name, child in layers:
        chosen = ways[tuple(child.weight.shape)]
        if chosen:
            setattr(parent, name, FewRowsLinear(child, chosen))
            num_replaced += 1
    return num_replaced


def is_eligible(linear: nn.Linear) -> bool:
    """Whether a layer is large enough, and of the device and dtype."""
    weight = linear.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= _MIN_WEIGHTS


def fastest_ways(weights: Sequence[torch.Tensor]) -> dict[int, Way]:
    """Return for each number of rows the way that gains most over torch's own, if one does."""
    with torch.inference_mode():
        sample = sample_of(weights)
        found = {num_rows: _fastest(sample, num_rows) for num_rows in (1, 2, 3, 4, 6, 8)}
    # Not measured: they go with one row more.
    found |= {5: found[6], 7: found[8]}
    return {num_rows: _widened(way, num_rows) for num_rows, way in found.items() if way is not None}


def _widened(way: Way, num_rows: int) -> Way:
    return Way(max(way.num_rows, num_rows), way.is_weight_first)


def sample_of(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return so many of `weights`, all of one shape, as are enough to measure with."""
    width = weights[0].shape[1]
    sample, left = [], _SAMPLE_BYTES // (4 * width)
    for weight in weights:
        sample.append(weight[: max(1, left)])
        left -= weight.shape[0]
        if left <= 0:
            break
    return sample


def _fastest(sample: Sequence[torch.Tensor], num_rows: int) -> Way | None:
    # A generator of its own: whoever seeded torch's must not find it moved.
    rows = torch.randn(num_rows, sample[0].shape[1], generator=torch.Generator().manual_seed(0))
    plain = Way(num_rows)
    wanted = plain.product(rows, sample[0])
    ways = {plain, Way(num_rows + num_rows % 2, True)} | ({Way(4), Way(4, True)} if num_rows < 4 else set())
    exact = [way for way in ways if is_close(way.product(rows, sample[0]), wanted)]
    taken_s = {way: float("inf") for way in exact}
    for _ in range(_NUM_TIMINGS):
        for way in exact:
            taken_s[way] = min(taken_s[way], _time_s(partial(way.product, rows), sample))
    best = min(taken_s, key=lambda way: taken_s[way])
    return best if taken_s[plain] >= _MIN_GAIN * taken_s[best] else None


def is_close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two results differ by no more than the order of sums."""
    return bool((found - wanted).abs().max() <= _MAX_ERROR * wanted.abs().max())


def best_s(product: Callable[[torch.Tensor], torch.Tensor], sample: Sequence[torch.Tensor]) -> float:
    """Return how long `product` takes for all of `sample`: the fastest of some times."""
    return min(_time_s(product, sample) for _ in range(_NUM_TIMINGS))


def _time_s(product: Callable[[torch.Tensor], torch.Tensor], sample: Sequence[torch.Tensor]) -> float:
    started_s = time.perf_counter()
    for weight in sample:
        product(weight)
    return time.perf_counter() - started_s
