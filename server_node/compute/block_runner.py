"""Run the blocks of a span: a step of a session over its KV cache, or a stateless forward."""

from collections.abc import Sequence

import torch

from server_node.compute.kv_cache import KVCache
from swarm_protocol.errors import BlocksNotServedError, InvalidTensorError, MaxLengthError, PositionError
from swarm_protocol.model.parts import SpanModule
from swarm_protocol.spans import Span

SCORES_BYTES = 256 * 1024 * 1024
"""What the attention scores of one block may take, in float32; more tokens go through in pieces. Eager attention, which
BLOOM, Gemma 2 and gpt-oss run, makes them all: a copy for 4,096 tokens of BLOOM-176B would take 7.5 GB."""


class BlockRunner:
    """The blocks of one span on their device. Only the compute thread may use it."""

    def __init__(self, module: SpanModule) -> None:
        self.module = module.requires_grad_(False)
        self._num_heads = max(
            int(module.config.per_layer_config[index].num_attention_heads) for index in range(len(module.span))
        )

    @property
    def span(self) -> Span:
        return self.module.span

    def new_cache(self, batch_size: int, max_tokens: int, blocks: Span | None = None) -> KVCache:
        """Return an empty cache for a session. Raises BlocksNotServedError for blocks outside of the span."""
        return KVCache(self.module, batch_size, max_tokens, blocks)

    def run_step(
        self,
        cache: KVCache,
        hidden_states: torch.Tensor,
        position: int,
        blocks: Span,
        row_order: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Return the hidden states (batch, seq, hidden) after `blocks`, with the cache grown by these tokens.

        `row_order` permutes the cache's rows first, and a `position` below its own rolls it back. If the step fails,
        the tokens before `position` are still there. Raises PositionError, MaxLengthError, InvalidTensorError,
        BlocksNotServedError, and InvalidRequestError for a bad row order.
        """
        self.begin_step(cache, hidden_states, position, blocks, row_order)
        return self.run_begun(cache, hidden_states, blocks)

    def begin_step(
        self,
        cache: KVCache,
        hidden_states: torch.Tensor,
        position: int,
        blocks: Span,
        row_order: Sequence[int] | None = None,
    ) -> None:
        """Check a step as `run_step` does and bring the cache to where it starts, without running it.

        What follows runs it in one piece or several, or together with other sessions' steps.
        """
        self.check(hidden_states, blocks)
        if blocks != cache.blocks:
            raise BlocksNotServedError(blocks, cache.blocks)
        batch_size, num_tokens, _ = hidden_states.shape
        if batch_size != cache.batch_size:
            raise InvalidTensorError(f"{batch_size} rows of hidden states, but the session has {cache.batch_size}")
        if not 0 <= position <= cache.position:
            raise PositionError(position, cache.position)
        if position + num_tokens > cache.max_tokens:
            raise MaxLengthError(position, num_tokens, cache.max_tokens)
        with torch.inference_mode():
            # The row order may be refused, so it goes first.
            if row_order is not None:
                cache.reorder(row_order)
            cache.rollback(position)

    def run_begun(self, cache: KVCache, hidden_states: torch.Tensor, blocks: Span) -> torch.Tensor:
        """Return the hidden states after `blocks` of tokens of a step that began; they follow those in the cache."""
        with torch.inference_mode():
            if not hidden_states.shape[1]:
                return hidden_states
            placed = self.placed(hidden_states)
            batch_size, num_tokens, _ = hidden_states.shape
            size = self._piece_tokens(batch_size, cache.position + num_tokens)
            outputs: list[torch.Tensor] = [
                self.module(placed[:, start : start + size], cache=cache, blocks=blocks)
                for start in range(0, num_tokens, size)
            ]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def forward(self, hidden_states: torch.Tensor, blocks: Span) -> torch.Tensor:
        """Return the hidden states after `blocks` of tokens that start at position 0; nothing is kept.

        Gradients flow to `hidden_states` if it requires them. Raises InvalidTensorError and BlocksNotServedError.
        """
        self.check(hidden_states, blocks)
        batch_size, num_tokens, _ = hidden_states.shape
        if num_tokens > self._piece_tokens(batch_size, num_tokens) and not hidden_states.requires_grad:
            return self.run_step(self.new_cache(batch_size, num_tokens, blocks), hidden_states, 0, blocks)
        return self.module(self.placed(hidden_states), blocks=blocks)  # type: ignore[no-any-return]

    def _piece_tokens(self, batch_size: int, num_keys: int) -> int:
        """Return how many tokens per row may go through at once, with `num_keys` tokens to attend to."""
        return max(1, SCORES_BYTES // (4 * batch_size * self._num_heads * num_keys))

    def check(self, hidden_states: torch.Tensor, blocks: Span) -> None:
        """Raise InvalidTensorError or BlocksNotServedError for what these blocks cannot run."""
        if not self.span.contains(blocks):
            raise BlocksNotServedError(blocks, self.span)
        hidden_size = self.module.config.hidden_size
        if hidden_states.dim() != 3 or hidden_states.shape[2] != hidden_size:
            raise InvalidTensorError(f"hidden states are (batch, seq, {hidden_size}), not {tuple(hidden_states.shape)}")
        if not hidden_states.is_floating_point():
            raise InvalidTensorError(f"hidden states are floating numbers, not {hidden_states.dtype}")

    def placed(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return `hidden_states` on the device and in the dtype of the blocks."""
        return hidden_states.to(device=self.module.device, dtype=self.module.dtype)
