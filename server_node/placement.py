"""Pure: which blocks a node takes when its owner names only how many."""

from collections.abc import Collection

from swarm_protocol.spans import Span


def choose_span(num_blocks: int, num_wanted: int, held: Collection[Span]) -> Span:
    """Return the `num_wanted` neighbouring blocks of a model of `num_blocks` that the spans of `held` cover least.

    The window with the most blocks that nobody holds wins, then the one with the most that one node holds, and so on
    (Petals, arXiv:2312.08361); among equals the first, so that the first nodes line up without overlap. At most
    `num_blocks` are taken. Raises ValueError if none is wanted.
    """
    if num_wanted < 1:
        raise ValueError(f"at least one block is needed, not {num_wanted}")
    length = min(num_wanted, num_blocks)
    holders = [sum(span.start <= block < span.end for span in held) for block in range(num_blocks)]
    start = min(range(num_blocks - length + 1), key=lambda first: sorted(holders[first : first + length]))
    return Span(start, start + length)


def num_blocks_that_fit(free_bytes: int, block_bytes: int, num_blocks: int) -> int:
    """Return how many blocks of `block_bytes` a node should take: those that leave half as much again for KV cache.

    0 if not even one fits.
    """
    return min(num_blocks, free_bytes * 2 // (3 * block_bytes))
