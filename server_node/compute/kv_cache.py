"""One session's keys and values for the blocks that it uses of a span.

transformers calls `update()` once per block and step; the position moves only when the span says that the step is
through, so a step that failed in the middle left nothing behind. Sliding-window blocks keep all their keys, the mask
does the window, so a rollback to any position works.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, PreTrainedConfig

from swarm_protocol.errors import BlocksNotServedError, InvalidRequestError, PositionError
from swarm_protocol.ids import PeerId
from swarm_protocol.messages import PAGE_TOKENS
from swarm_protocol.model import families
from swarm_protocol.model.parts import SpanModule
from swarm_protocol.spans import Span


def kv_bytes_per_token(config: PreTrainedConfig, blocks: Span, dtype: torch.dtype) -> int:
    """Return the size in bytes of one token's keys and values in all of `blocks`, for one row."""
    return sum(families.kv_bytes_per_token(config, block, dtype) for block in range(blocks.start, blocks.end))


@dataclass(frozen=True, slots=True)
class PageKey:
    """What a page is found by: whose it is, of which blocks, and a hash of all tokens up to its end."""

    owner: PeerId
    blocks: Span
    page_hash: bytes


@dataclass(frozen=True, slots=True)
class Page:
    """The keys and values of `PAGE_TOKENS` tokens in each block, (1, heads, tokens, head_dim)."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]

    @property
    def size_bytes(self) -> int:
        """What they take."""
        return sum(states.nbytes for states in (*self.keys, *self.values))


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What a token takes in one row: (heads, head_dim) of each block's keys and values, None for a block without any.

    Caches of nodes with the same numerics have the same layout.
    """

    dtype: torch.dtype
    blocks: tuple[tuple[tuple[int, int], tuple[int, int]] | None, ...]

    def values_per_token(self, batch_size: int) -> int:
        """Return how many numbers a token has in all rows and blocks."""
        return batch_size * sum(heads * size for block in self.blocks if block is not None for heads, size in block)


class PositionCache(Cache):  # type: ignore[misc]
    """What transformers asks of a cache whose blocks all hold the same tokens, so that the index never matters."""

    def __init__(self, blocks: Span) -> None:
        super().__init__(layers=[])
        self.blocks = blocks
        self.position = 0

    def __len__(self) -> int:
        return len(self.blocks)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.position

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.position

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.position + query_length, 0

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.blocks)

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self.blocks)

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * len(self.blocks)


class KVCache(PositionCache):
    """The cache of a session of `batch_size` rows and at most `max_tokens` tokens each, at the same position.

    Only the compute thread may use it. Buffers are (batch, heads, capacity, head_dim), allocated at the first step and
    grown in pages, so that a short session does not hold its maximum. `page_keys` name its first pages, if others may
    use them.
    """

    def __init__(self, module: SpanModule, batch_size: int, max_tokens: int, blocks: Span | None = None) -> None:
        """`blocks` is the part of the module's span that the session uses; None is all of it.

        Raises BlocksNotServedError if the module has not all of them.
        """
        super().__init__(blocks or module.span)
        if not module.span.contains(self.blocks):
            raise BlocksNotServedError(self.blocks, module.span)
        self._batch_size = batch_size
        self.max_tokens = max_tokens
        self.page_keys: tuple[PageKey, ...] = ()
        first = self.blocks.start - module.span.start
        self._places = module.places[first : first + len(self.blocks)]
        self._keys: list[torch.Tensor | None] = [None] * len(self.blocks)
        self._values: list[torch.Tensor | None] = [None] * len(self.blocks)

    @property
    def batch_size(self) -> int:
        """The number of rows."""
        return self._batch_size

    @property
    def size_bytes(self) -> int:
        """What the buffers take now."""
        return sum(buffer.nbytes for buffer in (*self._keys, *self._values) if buffer is not None)

    @property
    def capacity_tokens(self) -> int:
        """How many tokens fit before the buffers have to grow; 0 before the first step."""
        return min((0 if keys is None else keys.shape[2] for keys in self._keys), default=0)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a block's new keys and values behind the cached ones; return views of all of them.

        `layer_idx` is the block's index in the model. The views are valid until the next update.
        """
        index = layer_idx - self.blocks.start
        end = self.position + key_states.shape[2]
        keys, values = self._keys[index], self._values[index]
        if keys is None or values is None or keys.shape[2] < end:
            keys = self._keys[index] = self._grown(keys, key_states, end)
            values = self._values[index] = self._grown(values, value_states, end)
        keys[:, :, self.position : end] = key_states
        values[:, :, self.position : end] = value_states
        return keys[:, :, :end], values[:, :, :end]

    def _grown(self, buffer: torch.Tensor | None, states: torch.Tensor, num_tokens: int) -> torch.Tensor:
        # Half as much again each time: what is copied stays a constant share of what is written.
        wanted = max(num_tokens, self.position + self.position // 2)
        capacity = min(-(-wanted // PAGE_TOKENS) * PAGE_TOKENS, max(self.max_tokens, num_tokens))
        batch_size, num_heads, _, head_dim = states.shape
        grown = states.new_empty(batch_size, num_heads, capacity, head_dim)
        if buffer is not None and self.position:
            grown[:, :, : self.position] = buffer[:, :, : self.position]
        return grown

    def advance(self, num_tokens: int) -> None:
        """Count the tokens of a step that is through."""
        self.position += num_tokens

    def rollback(self, position: int) -> None:
        """Forget the tokens from `position` on. Raises PositionError if that many are not cached."""
        if not 0 <= position <= self.position:
            raise PositionError(position, self.position)
        if position < self.position:
            # Other tokens may come now than those that the later pages were named for.
            self.page_keys = self.page_keys[: position // PAGE_TOKENS]
        self.position = position

    def extend(self, max_tokens: int) -> None:
        """Let the cache hold `max_tokens` tokens, if those are more."""
        self.max_tokens = max(self.max_tokens, max_tokens)

    def read_page(self, index: int) -> Page:
        """Return a copy of page `index`, which has to be full."""
        tokens = slice(index * PAGE_TOKENS, (index + 1) * PAGE_TOKENS)
        keys, values = (
            tuple(buffer[:, :, tokens].clone() for buffer in buffers if buffer is not None)
            for buffers in (self._keys, self._values)
        )
        return Page(keys, values)

    def write_pages(self, pages: Sequence[Page]) -> None:
        """Let an empty cache begin with these pages."""
        assert not self.position
        for index in range(len(self.blocks)):
            for buffers, parts in (
                (self._keys, [page.keys[index] for page in pages]),
                (self._values, [page.values[index] for page in pages]),
            ):
                num_tokens = PAGE_TOKENS * len(pages)
                buffers[index] = buffer = self._grown(None, parts[0], num_tokens)
                torch.cat(parts, dim=2, out=buffer[:, :, :num_tokens])
        self.position = PAGE_TOKENS * len(pages)

    def layout(self) -> KVLayout | None:
        """Return what tokens look like; None before the first step."""
        found: list[tuple[tuple[int, int], tuple[int, int]] | None] = []
        dtype: torch.dtype | None = None
        for keys, values in zip(self._keys, self._values, strict=True):
            if keys is None or values is None:
                found.append(None)
            else:
                dtype = keys.dtype
                found.append(((keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3])))
        return None if dtype is None else KVLayout(dtype, tuple(found))

    def read_tokens(self, start: int, end: int) -> torch.Tensor:
        """Return copies of the tokens `[start, end)`, which have to be cached, as (tokens, values): see `Pages`."""
        buffers = [b for pair in zip(self._keys, self._values, strict=True) for b in pair if b is not None]
        widths = [buffer.shape[0] * buffer.shape[1] * buffer.shape[3] for buffer in buffers]
        states = buffers[0].new_empty(end - start, sum(widths))
        for part, buffer in zip(torch.split(states, widths, dim=1), buffers, strict=True):
            tokens = buffer[:, :, start:end].permute(2, 0, 1, 3)
            part.view(tokens.shape).copy_(tokens)
        return states

    def append_tokens(self, states: torch.Tensor, layout: KVLayout) -> None:
        """Write what `read_tokens` of another cache returned behind the tokens that are here."""
        at, num_tokens = 0, states.shape[0]
        for block, shapes in enumerate(layout.blocks):
            if shapes is None:
                continue
            pair = []
            for heads, size in shapes:
                width = self.batch_size * heads * size
                tokens = states[:, at : at + width].view(num_tokens, self.batch_size, heads, size)
                pair.append(tokens.permute(1, 2, 0, 3).to(self._places[block]))
                at += width
            self.update(pair[0], pair[1], self.blocks.start + block)
        self.advance(num_tokens)

    def reorder(self, row_order: Sequence[int]) -> None:
        """Make row `i` a copy of what was row `row_order[i]`, as beam search does.

        Raises InvalidRequestError unless there is one valid row index for each row.
        """
        if len(row_order) != self.batch_size or not all(0 <= row < self.batch_size for row in row_order):
            raise InvalidRequestError(f"a row order is {self.batch_size} indices below {self.batch_size}")
        if list(row_order) == list(range(self.batch_size)):
            return
        for buffers in (self._keys, self._values):
            for index, buffer in enumerate(buffers):
                if buffer is not None:
                    buffers[index] = buffer.index_select(0, torch.tensor(row_order, device=buffer.device))

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.max_tokens
