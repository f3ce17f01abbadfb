"""Pure: which of a span's blocks lie on which of several devices."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeviceRoom:
    """A device as `--device` names it, and the memory that new tensors on it can take."""

    name: str
    free_bytes: int


def split_blocks(num_blocks: int, block_bytes: int, free_bytes: Sequence[int]) -> tuple[int, ...]:
    """Return how many blocks each device takes, in the order of the devices; they are neighbours on each of them.

    Each block goes to where the most would be left for caches, so that all fit wherever they can.
    """
    counts = [0] * len(free_bytes)
    for _ in range(num_blocks):
        left = [free - count * block_bytes for free, count in zip(free_bytes, counts, strict=True)]
        counts[left.index(max(left))] += 1
    return tuple(counts)


def num_that_fit(block_bytes: int, free_bytes: Sequence[int]) -> int:
    """Return how many blocks fit, none of them on two devices."""
    return sum(max(0, free) // block_bytes for free in free_bytes)


def cache_room_bytes(counts: Sequence[int], free_bytes: Sequence[int]) -> int:
    """Return what a cache of all blocks may take, if each device holds that of its own `counts` of blocks.

    The device with the least room for each of its blocks decides.
    """
    used = [(free // count) for count, free in zip(counts, free_bytes, strict=True) if count]
    return sum(counts) * min(used, default=0)
