"""Attention of a batch of decode steps in which every session's keys and values stay where they are.

Padding them into one tensor copies the whole cache at each block and step: for 8 sessions of 1,000 tokens that takes
four times as long as the attention itself. transformers looks its attention up by a name in the configuration
(`AttentionInterface`); under the name of this module, each session's query goes through the family's own attention
function over that session's cache, and everything else of a block runs once for all rows. No family is named: one that
does not look its attention up, as BLOOM, is found out by the probe of `batch_runner.py` and padded.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedConfig

from server_node.compute.kv_cache import KVCache, PositionCache

_NAME = "umbel_sessions"


class SessionsCache(PositionCache):
    """The caches of several sessions of any lengths as one with all their rows, for one step of one token.

    Valid for one forward; works inside `sessions_attention`.
    """

    def __init__(self, caches: Sequence[KVCache]) -> None:
        """`caches` are of the same blocks."""
        super().__init__(caches[0].blocks)
        self.position = max(cache.position for cache in caches)
        self.positions = [cache.position for cache in caches for _ in range(cache.batch_size)]
        self._caches = caches
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write each row's key and value to its session's cache and keep views of all of them for `attend`."""
        if self._parts is not None:
            raise NotImplementedError("this family does not look its attention up by a name")
        sizes = [cache.batch_size for cache in self._caches]
        self._parts = [
            cache.update(keys, values, layer_idx)
            for cache, keys, values in zip(
                self._caches, torch.split(key_states, sizes), torch.split(value_states, sizes), strict=True
            )
        ]
        return key_states, value_states

    def advance(self, num_tokens: int) -> None:
        """Count the tokens of a step that is through, in every session."""
        if self._parts is not None:
            raise NotImplementedError("this family does not look its attention up by a name")
        for cache in self._caches:
            cache.advance(num_tokens)

    def attend(self, function: Callable[..., Any], module: Any, query: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        """Return the attention of each row's `query` (rows, heads, 1, head_dim) over its session's keys."""
        parts, self._parts = self._parts, None
        if parts is None:
            raise NotImplementedError("this family attends to other keys than those of the cache")
        queries = torch.split(query, [cache.batch_size for cache in self._caches])
        outputs = [
            function(module, own_query, keys, values, None, **kwargs)[0]
            for own_query, (keys, values) in zip(queries, parts, strict=True)
        ]
        return torch.cat(outputs), None


_running = threading.local()
"""The cache of the forward that runs in this thread, and the name of the attention that the family has by itself."""


class SessionsAttention:
    """Switches a span's blocks to attention by session while a batch runs."""

    def __init__(self, blocks: Iterable[torch.nn.Module], config: PreTrainedConfig) -> None:
        """`config` is that of the span; blocks may have others of their own."""
        AttentionInterface.register(_NAME, _attend)
        found = {id(config): config}
        for block in blocks:
            for module in block.modules():
                own = getattr(module, "config", None)
                if isinstance(own, PreTrainedConfig):
                    found[id(own)] = own
        self._configs = list(found.values())
        windows = [getattr(each, "sliding_window", None) for each in self._configs]
        self.max_tokens = min((int(window) for window in windows if window), default=sys.maxsize)
        """Longer sessions need a mask: windows are made of masks, and a session's own query gets none here."""

    @contextlib.contextmanager
    def running(self, cache: SessionsCache, config: PreTrainedConfig) -> Iterator[None]:
        """Let a forward inside attend by session. `config` is that of the base model that runs."""
        configs = [*self._configs, config]
        names = [each._attn_implementation for each in configs]
        _running.cache, _running.name = cache, names[0]
        try:
            for each in configs:
                # The public attribute would check the name against every backend, at each step.
                each._attn_implementation_internal = _NAME
            yield
        finally:
            _running.cache = None
            for each, name in zip(configs, names, strict=True):
                each._attn_implementation_internal = name


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None, **kwargs: Any
) -> Any:
    """transformers' attention interface. Keys and values are those of the new tokens; the cache has all of them."""
    own = sys.modules[type(module).__module__]
    functions = getattr(own, "ALL_ATTENTION_FUNCTIONS", {})
    eager = getattr(own, "eager_attention_forward", None)
    function = eager if _running.name == "eager" or _running.name is None else functions.get(_running.name)
    if function is None:
        raise NotImplementedError(f"{_running.name} attention of {type(module).__name__} cannot be found")
    return _running.cache.attend(function, module, query, kwargs)
