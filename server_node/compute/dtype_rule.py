"""Pure: which dtype a node computes in if its owner did not say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MIN_GAIN = 1.2
"""Times faster at decode steps another dtype must be to be taken instead of the preferred one. Below it, what a machine
measures differs from one start to the next, and like machines would not choose alike."""

MAX_LOSS = 1.2
"""Times slower it may be at prompts."""


@dataclass(frozen=True, slots=True)
class BlockTimes:
    """Seconds of one block: a decode step of one row, and a prompt."""

    decode_s: float
    prompt_s: float


def candidates(device_type: str, stored: str) -> tuple[str, ...]:
    """Return the dtypes that may be chosen, the preferred one first; `stored` is the checkpoint's own.

    On a CPU float32 is preferred, which is exact and gives a row the same result in any batch; elsewhere the
    checkpoint's own, which is what it was made in.
    """
    if device_type == "cpu":
        return ("float32", "bfloat16")
    return (stored, *(dtype for dtype in ("bfloat16", "float16") if dtype != stored))


def fastest(times: Mapping[str, BlockTimes], preferred: Sequence[str]) -> str:
    """Return the preferred dtype, or the one that decodes fastest among those that are worth it."""
    first = times[preferred[0]]
    worth_it = [
        dtype
        for dtype in preferred[1:]
        if first.decode_s >= MIN_GAIN * times[dtype].decode_s and times[dtype].prompt_s <= MAX_LOSS * first.prompt_s
    ]
    return min(worth_it, key=lambda dtype: times[dtype].decode_s, default=preferred[0])
