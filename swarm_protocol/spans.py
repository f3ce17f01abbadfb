"""Pure: a span of transformer blocks, half-open in code and flags, inclusive in sentences for people."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Blocks `[start, end)` of a model; never empty.

    Raises ValueError if `start` is negative or `end` is not above it.
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"a span needs 0 <= start < end, not {self.start}:{self.end}")

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"

    def contains(self, other: "Span") -> bool:
        """Whether every block of `other` is a block of this span."""
        return self.start <= other.start and other.end <= self.end

    @classmethod
    def parse(cls, text: str) -> "Span":
        """Return the span written `start:end`. Raises ValueError for anything else."""
        start, separator, end = text.partition(":")
        if not (separator and start.isdecimal() and end.isdecimal()):
            raise ValueError(f"a span is written start:end, such as 0:15, not {text!r}")
        return cls(int(start), int(end))


def describe_blocks(span: Span) -> str:
    """Return the span as people read it: `block 3`, `blocks 12–15`."""
    return f"block {span.start}" if len(span) == 1 else f"blocks {span.start}–{span.end - 1}"


def uncovered(spans: Iterable[Span], num_blocks: int) -> list[Span]:
    """Return the maximal runs of blocks of `[0, num_blocks)` that no span covers, in order."""
    covered = {block for span in spans for block in range(span.start, min(span.end, num_blocks))}
    holes: list[Span] = []
    for block in range(num_blocks):
        if block in covered:
            continue
        if holes and holes[-1].end == block:
            holes[-1] = Span(holes[-1].start, block + 1)
        else:
            holes.append(Span(block, block + 1))
    return holes
