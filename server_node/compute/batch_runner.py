"""Decode steps of several sessions in one forward, whatever their lengths.

Where a family lets its attention be chosen by name, every session attends to its own keys where they lie, and the
rest of a block runs once for all rows (`batch_attention.py`). Else the rows of a batch are aligned at their ends:
every row's newest key is in the last column, and shorter rows begin with padding that a 2-D mask hides. Left padding
is what transformers' own batched generation has, so every family knows it: distances between tokens stay what they
are, which is all that causal and sliding-window masks need, ALiBi is built from that mask, and rotary embeddings
follow the position ids. Each session's new keys and values are written to its own cache; the padded copies live for
one forward, in buffers that all blocks share.

What a family makes of it is not taken on trust: when the span is loaded, a small batch is compared with the same steps
one by one, and `Joining` says how steps are batched from then on. Each block is compared by itself, since many of them
amplify plain rounding: random states through all 30 of SmolLM2 differ by 5e-5, through one by 1e-6.
"""

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from server_node.compute.batch_attention import SessionsAttention, SessionsCache
from server_node.compute.block_runner import BlockRunner
from server_node.compute.kv_cache import KVCache, PositionCache
from swarm_protocol.spans import Span

_log = logging.getLogger(__name__)

_PROBE_LENGTHS = ((3, 1), (9, 2), (6, 1))
"""Tokens and rows of the sessions that are probed."""

_PROBE_BLOCKS = 12
"""Blocks from the span's first on, and its last one: kinds of blocks alternate in shorter patterns."""

_MAX_ERROR = 1e-5
"""In float32 and one block, relative to the largest value; a wrong mask or position shows as 1e-2 and more."""

_MAX_NOISE = 1e-4
"""The same without any padding, where only rounding differs: 5e-6 in SmolLM2. More means that rows are mixed up."""

_NOISE_FACTOR = 3.0
"""Padding may cost so many times what differs without it, where that is more than the limit."""

_MAX_ERROR_EPS = 8.0
"""In other dtypes, in units of their resolution; rounding differs with the number of rows."""

_LEAST_WINDOW = 16
"""Tokens. Blocks with shorter windows are padded: the probe has to go without a mask, too."""

_STRETCHED_ROPES = ("dynamic", "longrope")
"""Rotary embeddings that transformers scales by the longest row of a batch; short probes would not show it."""


class Joining(Enum):
    """Which decode steps share a forward."""

    PADDED = "of any lengths"
    EQUAL = "of equal lengths"
    ALONE = "none"


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One token for each row of a session; as `BlockRunner.run_step`."""

    cache: KVCache
    hidden_states: torch.Tensor
    position: int
    blocks: Span
    row_order: Sequence[int] | None = None


class BatchCache(PositionCache):
    """The caches of several sessions as one with all their rows, for one step of one token.

    Valid for one forward; the sessions' positions move on when the span says that it is through.
    """

    def __init__(self, caches: Sequence[KVCache]) -> None:
        """`caches` are of the same blocks."""
        super().__init__(caches[0].blocks)
        self.position = max(cache.position for cache in caches)
        self._caches = caches
        self._buffers: dict[tuple[str, int, int, torch.device], torch.Tensor] = {}

    @property
    def num_rows(self) -> int:
        return sum(cache.batch_size for cache in self._caches)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write each row's key and value to its session's cache; return those of all rows, padded at the left.

        The result is valid until the next update.
        """
        keys, values = self._buffer("keys", key_states), self._buffer("values", value_states)
        first = 0
        for cache in self._caches:
            rows = slice(first, first + cache.batch_size)
            own_keys, own_values = cache.update(key_states[rows], value_states[rows], layer_idx)
            keys[rows, :, -own_keys.shape[2] :] = own_keys
            values[rows, :, -own_values.shape[2] :] = own_values
            first = rows.stop
        return keys, values

    def _buffer(self, name: str, states: torch.Tensor) -> torch.Tensor:
        # Blocks of one shape and device share one: the padding stays zero, the rest is written anew by each of them.
        key = (name, states.shape[1], states.shape[3], states.device)
        if key not in self._buffers:
            shape = (self.num_rows, states.shape[1], self.position + 1, states.shape[3])
            self._buffers[key] = states.new_zeros(shape)
        return self._buffers[key]

    def advance(self, num_tokens: int) -> None:
        """Count the tokens of a step that is through, in every session."""
        for cache in self._caches:
            cache.advance(num_tokens)

    def padding(self, device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the 2-D mask (rows, tokens) and the position ids (rows, 1); None for both if all lengths are equal."""
        if all(cache.position == self.position for cache in self._caches):
            return None, None
        lengths = [cache.position for cache in self._caches for _ in range(cache.batch_size)]
        position_ids = torch.tensor(lengths, device=device)[:, None]
        columns = torch.arange(self.position + 1, device=device)
        return (columns >= self.position - position_ids).long(), position_ids


class BatchRunner:
    """Runs decode steps together. Only the compute thread may use it."""

    def __init__(self, runner: BlockRunner) -> None:
        self._runner = runner
        self._joining: Joining | None = None
        self._attention = SessionsAttention(runner.module.blocks, runner.module.config)
        self._is_in_place = self._attention.max_tokens >= _LEAST_WINDOW

    @property
    def joining(self) -> Joining:
        """How steps are batched on this span; probed when it is first asked for."""
        if self._joining is None:
            self._joining = self._probe()
            place = "in place" if self.pads_nothing else "padded"
            _log.info("decode steps that run together: %s, %s blocks=%s", self._joining.value, place, self._runner.span)
        return self._joining

    @property
    def pads_nothing(self) -> bool:
        """Whether the length of the longest session costs the others nothing."""
        return self.joining is Joining.PADDED and self._is_in_place

    def group(self, cache: KVCache, blocks: Span, position: int) -> Hashable:
        """Return what steps must have in common to run together."""
        if self.joining is Joining.PADDED:
            return blocks
        return (blocks, position) if self.joining is Joining.EQUAL else id(cache)

    def run(self, steps: Sequence[DecodeStep]) -> list[torch.Tensor | Exception]:
        """Return the hidden states after the blocks for each step, or what went wrong with it.

        Steps are of one `group` and of different sessions. One that fails leaves the tokens before its position, and
        the others alone.
        """
        results: dict[int, torch.Tensor | Exception] = {}
        together: list[int] = []
        for number, step in enumerate(steps):
            error = self._begin(step)
            if error is not None:
                results[number] = error
            elif step.hidden_states.shape[1]:
                together.append(number)
            else:
                results[number] = step.hidden_states
        results.update(zip(together, self._run_begun([steps[number] for number in together]), strict=True))
        return [results[number] for number in range(len(steps))]

    def _begin(self, step: DecodeStep) -> Exception | None:
        try:
            self._runner.begin_step(step.cache, step.hidden_states, step.position, step.blocks, step.row_order)
        except Exception as error:
            return error
        return None

    def _run_begun(self, steps: Sequence[DecodeStep]) -> Sequence[torch.Tensor | Exception]:
        if len(steps) > 1:
            try:
                return self._run_together(steps)
            except Exception:
                # Nothing has moved on. Which step it was shows when each runs by itself.
                _log.exception("%d steps failed together and run one by one blocks=%s", len(steps), steps[0].blocks)
        return [self._run_alone(step) for step in steps]

    def _run_together(self, steps: Sequence[DecodeStep]) -> Sequence[torch.Tensor]:
        caches = [step.cache for step in steps]
        with torch.inference_mode():
            hidden_states = torch.cat([self._runner.placed(step.hidden_states) for step in steps])
            longest = max(cache.position for cache in caches) + 1
            is_in_place = self._is_in_place and longest <= self._attention.max_tokens
            run = self._run_in_place if is_in_place else self._run_padded
            output = run(hidden_states, caches, steps[0].blocks)
            return torch.split(output, [cache.batch_size for cache in caches])

    def _run_in_place(self, hidden_states: torch.Tensor, caches: Sequence[KVCache], blocks: Span) -> torch.Tensor:
        module, cache = self._runner.module, SessionsCache(caches)
        position_ids = torch.tensor(cache.positions, device=hidden_states.device)[:, None]
        with self._attention.running(cache, module.config_of(blocks)):
            return module(hidden_states, cache=cache, blocks=blocks, position_ids=position_ids)  # type: ignore[no-any-return]

    def _run_padded(self, hidden_states: torch.Tensor, caches: Sequence[KVCache], blocks: Span) -> torch.Tensor:
        cache = BatchCache(caches)
        mask, position_ids = cache.padding(hidden_states.device)
        return self._runner.module(  # type: ignore[no-any-return]
            hidden_states, cache=cache, blocks=blocks, position_ids=position_ids, attention_mask=mask
        )

    def _run_alone(self, step: DecodeStep) -> torch.Tensor | Exception:
        try:
            return self._runner.run_begun(step.cache, step.hidden_states, step.blocks)
        except Exception as error:
            return error

    # the probe

    def _probe(self) -> Joining:
        config, dtype = self._runner.module.config, self._runner.module.dtype
        rounding = 0.0 if dtype == torch.float32 else _MAX_ERROR_EPS * torch.finfo(dtype).eps
        noise = self._error([(6, num_rows) for _, num_rows in _PROBE_LENGTHS])
        if noise > max(_MAX_NOISE, rounding) and self._is_in_place:
            self._is_in_place = False
            return self._probe()
        if noise > max(_MAX_NOISE, rounding):
            return Joining.ALONE
        if any(name in _rope_types(config) for name in _STRETCHED_ROPES):
            return Joining.EQUAL
        limit = max(_MAX_ERROR, rounding, _NOISE_FACTOR * noise)
        if self._error(_PROBE_LENGTHS) <= limit:
            return Joining.PADDED
        if self._is_in_place:
            self._is_in_place = False
            return self._probe()
        return Joining.EQUAL

    def _error(self, sessions: Sequence[tuple[int, int]]) -> float:
        """Return how far two batched steps of sessions of these tokens and rows are from the same steps one by one."""
        span = self._runner.span
        parts = [Span(block, block + 1) for block in range(span.start, span.end)]
        parts = parts[:_PROBE_BLOCKS] + parts[_PROBE_BLOCKS:][-1:]
        try:
            worst = max(self._error_of(part, sessions) for part in parts)
        except Exception as error:
            # Whatever a family raises here, it says that it cannot be batched so.
            _log.info("batched steps of %s failed: %r blocks=%s", sessions, error, span)
            return float("inf")
        _log.debug("batched steps of %s are off by %.2g blocks=%s", sessions, worst, span)
        return worst

    def _error_of(self, blocks: Span, sessions: Sequence[tuple[int, int]]) -> float:
        hidden_size = self._runner.module.config.hidden_size
        generator = torch.Generator().manual_seed(0)
        together: list[KVCache] = []
        alone: list[KVCache] = []
        for num_tokens, num_rows in sessions:
            prompt = _random(num_rows, num_tokens, hidden_size, generator)
            for caches in (together, alone):
                caches.append(self._runner.new_cache(num_rows, num_tokens + 1, blocks))
                self._runner.run_begun(caches[-1], prompt, blocks)
        states = [_random(num_rows, 1, hidden_size, generator) for _, num_rows in sessions]
        steps = [DecodeStep(cache, state, 0, blocks) for cache, state in zip(together, states, strict=True)]
        found = torch.cat(list(self._run_together(steps)))
        wanted = torch.cat(
            [self._runner.run_begun(cache, state, blocks) for cache, state in zip(alone, states, strict=True)]
        )
        error = ((found - wanted).abs().max() / wanted.abs().max()).item()
        # What is not a number is above every limit.
        return error if error == error else float("inf")


def _random(num_rows: int, num_tokens: int, hidden_size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(num_rows, num_tokens, hidden_size, generator=generator)


def _rope_types(config: Any) -> str:
    """Return what a configuration says of its rotary embeddings, for all kinds of layers, as text."""
    return str(getattr(config, "rope_parameters", None) or "")
