"""Keys and values of sessions that move between nodes: read here, or checked and written.

A token is written in all blocks at once, or not at all: what a cache says is in it was written by somebody. Buffers are
not cleared when they are made, and what was in that memory before is another one's.
"""

import torch

from server_node.compute.block_runner import BlockRunner
from server_node.compute.kv_cache import KVCache, KVLayout
from server_node.compute.work import AppendWork, ReadTokens, ReadWork
from swarm_protocol.errors import InvalidTensorError, MaxLengthError, PositionError
from swarm_protocol.spans import Span
from swarm_protocol.tensors import check_finite, dtype_name, from_wire, to_wire


class KVCopies:
    """Reads and writes caches of one span. Only the compute thread may use it."""

    def __init__(self, runner: BlockRunner) -> None:
        self._runner = runner
        self._layout: KVLayout | None = None

    def read(self, work: ReadWork) -> ReadTokens:
        """Return what `work` asks for; no tokens if so many are not cached, at least one if there are any."""
        cache = work.cache
        layout = self._layout_of(cache.blocks)
        width = layout.values_per_token(cache.batch_size)
        cached = min(cache.position, work.end)
        start = min(work.position, cached)
        num_tokens = max(1, work.max_bytes // max(1, width * layout.dtype.itemsize))
        end = min(start + num_tokens, cached)
        if start == end:
            return ReadTokens(to_wire(torch.empty(0, width, dtype=layout.dtype)), 0)
        return ReadTokens(to_wire(cache.read_tokens(start, end)), cached - end)

    def append(self, work: AppendWork) -> KVCache:
        """Check tokens and write them; the cache is rolled back to where they go.

        Raises PositionError, MaxLengthError or InvalidTensorError, and then nothing is written.
        """
        cache, found = work.cache, work.states
        layout = self._layout_of(cache.blocks)
        width = layout.values_per_token(cache.batch_size)
        if len(found.shape) != 2 or found.shape[1] != width or found.dtype != dtype_name(layout.dtype):
            raise InvalidTensorError(f"keys and values as {found}; (tokens, {width}) in {layout.dtype} is needed")
        if work.position > cache.position:
            raise PositionError(work.position, cache.position)
        if work.position + found.shape[0] > cache.max_tokens:
            raise MaxLengthError(work.position, found.shape[0], cache.max_tokens)
        states = from_wire(found)
        check_finite(states)
        cache.rollback(work.position)
        if found.shape[0]:
            cache.append_tokens(states.to(self._runner.module.device), layout)
        return cache

    def _layout_of(self, blocks: Span) -> KVLayout:
        """Return what a token takes in some blocks of the span. The first time a token is computed to find out."""
        if self._layout is None:
            module = self._runner.module
            cache = self._runner.new_cache(1, 1)
            states = torch.zeros(1, 1, module.config.hidden_size, dtype=module.dtype, device=module.device)
            self._runner.run_step(cache, states, 0, module.span)
            self._layout = cache.layout()
            assert self._layout is not None
        first = blocks.start - self._runner.span.start
        return KVLayout(self._layout.dtype, self._layout.blocks[first : first + len(blocks)])
