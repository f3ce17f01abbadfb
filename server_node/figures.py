"""Pure: what was measured of blocks on a device, as it is kept on disk and shown."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

MAX_AGE_S = 30 * 86_400.0
"""Older figures are measured anew: drivers and machines change in ways that no key names."""

_VERSION = 1
_MAX_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class FiguresKey:
    """What figures depend on. `numerics` is revision, dtype and kernels; `span_class` the binary digits of its blocks.

    Figures are per block, but what a step costs besides is shared by the blocks of a span.
    """

    model: str
    numerics: str
    span_class: int
    device: str
    threads: int
    software: str

    @property
    def file_name(self) -> str:
        return sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32] + ".json"


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds per block: of a decode step by its rows, and of each token of a prompt; `measured_s` since the epoch."""

    decode_s: Mapping[int, float]
    block_token_s: float
    measured_s: float

    def steps_per_s(self, num_blocks: int) -> dict[int, float]:
        """Return how many decode steps a second a span does, by their rows."""
        return {rows: 1.0 / (seconds * num_blocks) for rows, seconds in self.decode_s.items()}

    def prompt_tokens_per_s(self, num_blocks: int) -> float:
        """Return how many tokens of prompts a second a span does."""
        return 1.0 / (self.block_token_s * num_blocks)


def to_text(key: FiguresKey, figures: Figures) -> str:
    """Return what is kept in a file."""
    return json.dumps({"version": _VERSION, "key": asdict(key), "figures": asdict(figures)})


def from_text(text: str, key: FiguresKey, now_s: float) -> Figures | None:
    """Return what `to_text` was given; None if it was for another key, is too old, or no such text."""
    try:
        values: dict[str, Any] = json.loads(text)
        if values["version"] != _VERSION or values["key"] != asdict(key):
            return None
        found = values["figures"]
        decode_s = {int(rows): float(seconds) for rows, seconds in found["decode_s"].items()}
        figures = Figures(decode_s, float(found["block_token_s"]), float(found["measured_s"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    seconds = (*figures.decode_s.values(), figures.block_token_s)
    is_sound = 1 in decode_s and all(math.isfinite(value) and 0 < value <= _MAX_SECONDS for value in seconds)
    # A clock that was put back makes figures of the future.
    return figures if is_sound and 0 <= now_s - figures.measured_s <= MAX_AGE_S else None


def figures_table(figures: Figures, num_blocks: int) -> str:
    """Return the figures of a span for people."""
    lines = [f"{'rows':>6} {'steps/s':>10} {'tokens/s':>10}"]
    for rows, rate in sorted(figures.steps_per_s(num_blocks).items()):
        lines.append(f"{rows:>6} {rate:>10.1f} {rows * rate:>10.1f}")
    lines.append(f"prompt {'':>10} {figures.prompt_tokens_per_s(num_blocks):>10.1f}")
    return "\n".join(lines)
