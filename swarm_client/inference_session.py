"""Inference sessions as users see them: tensors in, tensors out, KV caches at the nodes."""

import contextlib
import contextvars
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import torch

from swarm_client.config import ClientConfig
from swarm_client.events import EventListener, Recovered
from swarm_client.generation_times import GenerationTimes
from swarm_client.leg import HopTiming, StepResult
from swarm_client.loop_thread import LoopThread
from swarm_client.prefix_hashes import TokenPrefix
from swarm_client.row_groups import RowGroup, all_of, close_together, open_together
from swarm_client.step_runner import StepRunner
from swarm_client.swarm_session import SwarmSession
from swarm_client.time_log import TimeLog
from swarm_protocol.errors import (
    InvalidRequestError,
    MaxLengthError,
    SessionClosedError,
    SwarmError,
)
from swarm_protocol.messages import MAX_BATCH_ROWS
from swarm_protocol.tensors import dtype_name, from_wire, token_part

_active: "contextvars.ContextVar[InferenceSession | None]" = contextvars.ContextVar("umbel_session", default=None)


def active_session() -> "InferenceSession | None":
    """Return the innermost session that this thread (or task) entered with `with`, unless another thread left it."""
    session = _active.get()
    return session if session is not None and session.is_entered else None


class InferenceSession:
    """A sequence of steps over the same tokens: `step` extends them, setting `position` rolls back.

    Used by one thread at a time. A context manager: inside, `model(…)` and `model.generate(…)` use it by themselves.
    The caches are reserved at the first step, which says how many rows there are.
    """

    def __init__(
        self,
        loop: LoopThread,
        config: ClientConfig,
        open_rows: Callable[[int, int], SwarmSession],
        max_length: int,
        on_event: EventListener | None = None,
    ) -> None:
        """`open_rows(batch_size, max_length)` makes a SwarmSession, not yet open. Mostly made by a model.

        `on_event` is told what happens to the route, by the thread that waits for a step; what it raises ends that.
        """
        if max_length < 1:
            raise InvalidRequestError(f"max_length is {max_length}; at least 1 token is needed")
        self.max_length = max_length
        self.token_ids: torch.Tensor | None = None
        """The ids (batch, n) that the model put through this session; None for a session that only got states."""
        self.token_padding: tuple[int, ...] = ()
        """How many of them at the beginning of each row are padding."""
        self.last_timings: tuple[HopTiming, ...] = ()
        """Where the time of the last step went, hop by hop."""
        self.span_outputs: tuple[torch.Tensor, ...] = ()
        """The hidden states (batch, seq, hidden) of the last step after every span, if asked for."""
        self.time_log = TimeLog()
        """Collects the times of the steps; a generation that begins restarts it."""
        self._step_timings: list[HopTiming] = []
        self._loop = loop
        self._config = config
        self._open_rows = open_rows
        self._groups: list[RowGroup] = []
        self._batch_size: int | None = None
        self._padding: tuple[int, ...] = ()
        self._position = 0
        self._row_order: torch.Tensor | None = None
        self._runner = StepRunner(loop, on_event)
        self._is_closed = False
        self._is_broken = False
        self._tokens: list[contextvars.Token[InferenceSession | None]] = []

    @property
    def position(self) -> int:
        """Columns (tokens and padding of each row) that are cached. Setting a lower one rolls back to it."""
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        if not 0 <= position <= self._position:
            raise InvalidRequestError(f"position {position} is not cached: 0 to {self._position} are")
        self._position = position
        if self.token_ids is not None:
            self.token_ids = self.token_ids[:, :position]

    @property
    def batch_size(self) -> int | None:
        """The number of rows; None before the first step."""
        return self._batch_size

    @property
    def padding(self) -> tuple[int, ...]:
        """The left padding columns of each row; empty before the first step."""
        return self._padding

    @property
    def on_event(self) -> EventListener | None:
        """Who is told what happens to the route; may be exchanged between two steps."""
        return self._runner.listener

    @on_event.setter
    def on_event(self, listener: EventListener | None) -> None:
        self._runner.listener = listener

    @property
    def times(self) -> GenerationTimes:
        """Where the time of the last generation went; without one, that of all steps."""
        return self.time_log.report()

    @property
    def is_taped(self) -> bool:
        """Whether blocks of a node that fails can be given to others; if not, all has to be computed again."""
        return all(group.session.is_whole for group in self._groups)

    @property
    def route(self) -> list[str]:
        """The route as people read it, one line for each hop of the first rows; empty before the first step."""
        return [f"{hop.span} {hop.peer_id}" for hop in self._groups[0].session.route] if self._groups else []

    def step(
        self,
        hidden_states: torch.Tensor,
        *,
        padding: Sequence[int] | None = None,
        with_span_outputs: bool = False,
    ) -> torch.Tensor:
        """Return the states (batch, seq, hidden) after the last block for those that enter the first block.

        The dtype is kept. `padding` are the left padding columns of each row, fixed by the first step; the output is
        zero there. Raises MaxLengthError when the session would get too long, SwarmError for what happens at nodes;
        the position is unchanged then.
        """
        self._check_open()
        if hidden_states.dim() != 3 or not 1 <= hidden_states.shape[0] <= MAX_BATCH_ROWS:
            raise InvalidRequestError(
                f"hidden states of shape {tuple(hidden_states.shape)}; (batch, seq, hidden) with 1 to {MAX_BATCH_ROWS} "
                "rows is needed"
            )
        columns = hidden_states.shape[1]
        if self._position + columns > self.max_length:
            raise MaxLengthError(self._position, columns, self.max_length)
        with self.cancellable():
            self._prepare(hidden_states.shape[0], padding, columns)
            with self._timed(columns):
                outputs = self._step_chunks(hidden_states, with_span_outputs)
        depth = min(len(parts) for parts in outputs)
        spans = [_joined(parts) for parts in zip(*(parts[-depth:] for parts in outputs), strict=True)]
        spans = [span.to(hidden_states.device) for span in spans]
        is_every_span = len(spans) == len(self._groups[0].session.route)
        self.span_outputs = tuple(spans) if with_span_outputs and is_every_span else ()
        return spans[-1]

    def start_with(self, token_ids: Sequence[int], dtype: torch.dtype) -> None:
        """Open the session for one row that will begin with these tokens, in hidden states of `dtype`.

        What nodes still have of them from earlier sessions of this client is cached at once: `position` says how many
        tokens that are. Nothing happens if the session is open. Raises SwarmError.
        """
        self._check_open()
        if self._batch_size is not None or not self._config.reuse_prefixes:
            return
        with self.cancellable():
            self._position = self._open(1, (0,), len(token_ids) + 1, TokenPrefix(tuple(token_ids), dtype_name(dtype)))

    def cancel(self) -> None:
        """Let a step that runs in another thread end now with CancelledStepError; the session stays usable."""
        self._runner.cancel()

    def cancellable(self) -> contextlib.AbstractContextManager[None]:
        """Let a `cancel` that comes between the steps inside end the next one of them; outside it would do nothing."""
        return self._runner.cancellable()

    def reorder(self, row_order: torch.Tensor) -> None:
        """Let row i continue what row `row_order[i]` was; carried out with the next step."""
        order = row_order.cpu()
        self._row_order = order if self._row_order is None else self._row_order[order]

    def reset(self) -> None:
        """Forget everything that is cached, so that a step with another number of rows may come; keeps `token_ids`."""
        token_ids = self.token_ids
        self._close_groups()
        self.position = 0
        self.token_ids = token_ids
        self._batch_size, self._padding, self._row_order = None, (), None
        self._is_broken = False

    def recover(self) -> None:
        """Forget what is cached if the last step failed but may succeed elsewhere, so that a new route is taken.

        For those who can compute everything again from `position` 0 on; keeps `token_ids`.
        """
        if self._is_broken:
            self.reset()

    def close(self) -> None:
        """Free the caches at the nodes. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._close_groups()

    @property
    def is_entered(self) -> bool:
        """Whether a `with` of this session is not left yet."""
        return bool(self._tokens)

    def __enter__(self) -> "InferenceSession":
        self._check_open()
        self._tokens.append(_active.set(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            _active.reset(self._tokens.pop())
        finally:  # a generator may be closed in another thread than it was entered in, where the reset fails
            if not self._tokens:
                self.close()

    def went_on(self, began_s: float, num_tokens: int) -> None:
        """Tell that the caller had all tokens computed again after what failed at `began_s` of `time.perf_counter`."""
        self.time_log.recovered(num_tokens)
        if self.on_event is not None:
            self.on_event(Recovered(time.perf_counter() - began_s, num_tokens))

    @contextlib.contextmanager
    def _timed(self, columns: int) -> Iterator[None]:
        """Log the step of `columns` columns that runs inside; one that fails counts as stall of the next."""
        self._step_timings.clear()
        started_s = time.perf_counter()
        try:
            yield
        except BaseException:
            self._stalled_s()
            self.time_log.failed(started_s, time.perf_counter())
            raise
        self.time_log.stepped(started_s, time.perf_counter(), columns, self._step_timings, self._stalled_s())

    def _stalled_s(self) -> float:
        """Return how long what ran was held up by recovering."""
        recovered = self._runner.take_recovered()
        for event in recovered:
            self.time_log.recovered(event.num_tokens)
        return sum(event.stall_s for event in recovered)

    def _check_open(self) -> None:
        if self._is_closed:
            raise SessionClosedError("the session is closed; open a new one")

    def _prepare(self, rows: int, padding: Sequence[int] | None, columns: int) -> None:
        """Open the session for these rows, or see that they are those that it has."""
        has_other_padding = padding is not None and any(padding) and tuple(padding) != self._padding
        if self._batch_size is not None and self._position == 0 and (rows != self._batch_size or has_other_padding):
            self.reset()
        if self._batch_size is None:
            self._open(rows, tuple(padding or (0,) * rows), columns)
        elif rows != self._batch_size:
            raise InvalidRequestError(f"the session has {self._batch_size} rows, this step has {rows}")
        elif has_other_padding:
            raise InvalidRequestError("padding is only possible at the very beginning of a session")

    def _open(self, rows: int, padding: tuple[int, ...], columns: int, prefix: TokenPrefix | None = None) -> int:
        """Open the groups for `columns` columns at first; return how many of the first are cached already."""
        if len(padding) != rows:
            raise InvalidRequestError(f"padding for {len(padding)} rows, the step has {rows}")
        groups = [
            RowGroup(
                members := [row for row in range(rows) if padding[row] == width],
                width,
                self._open_rows(len(members), self.max_length - width),
            )
            for width in sorted(set(padding))
        ]
        for group in groups:
            group.session.news.listener = self._runner.put
        started_s = time.perf_counter()
        cached = self._runner.run(
            lambda: open_together(
                [group.session for group in groups], [group.position(columns) for group in groups], prefix
            )
        )
        self.time_log.opened(started_s, time.perf_counter(), self._stalled_s())
        self._groups, self._batch_size, self._padding = groups, rows, padding
        return min(cached)

    def _close_groups(self) -> None:
        groups, self._groups = self._groups, []
        if groups:
            with contextlib.suppress(SessionClosedError):  # the whole connection is closed, and the sessions with it
                self._loop.run(close_together([group.session for group in groups]))

    def _step_chunks(self, hidden_states: torch.Tensor, with_span_outputs: bool) -> list[tuple[torch.Tensor, ...]]:
        before, columns = self._position, hidden_states.shape[1]
        width = max(1, self._config.step_tokens // hidden_states.shape[0])
        outputs: list[tuple[torch.Tensor, ...]] = []
        try:
            if columns > 1 and self._row_order is None and self._padding and not any(self._padding):
                return self._run_group(self._groups[0], hidden_states, with_span_outputs)
            for start in range(0, max(1, columns), width):
                chunk = hidden_states[:, start : start + width]
                outputs.append(self._step_chunk(chunk, with_span_outputs))
                self._position += chunk.shape[1]
        except BaseException as error:
            self._position = before
            self._is_broken = isinstance(error, SwarmError) and error.retryable
            raise
        return outputs

    def _run_group(
        self, group: RowGroup, hidden_states: torch.Tensor, with_span_outputs: bool
    ) -> list[tuple[torch.Tensor, ...]]:
        """Run rows that are all in one group, without padding."""
        columns, start = hidden_states.shape[1], group.position(self._position)
        states = group.as_it_travels(hidden_states)  # made here, not by the loop
        results = self._runner.run(
            lambda: group.session.run(
                lambda first, end: token_part(states, first, end), columns, start, every_span=with_span_outputs
            )
        )
        outputs = []
        for result in results:
            width = result.outputs[-1].shape[1]
            outputs.append(self._assemble(hidden_states[:, :width], [group], [result], with_span_outputs))
        self._position += columns
        return outputs

    def _step_chunk(self, chunk: torch.Tensor, with_span_outputs: bool) -> tuple[torch.Tensor, ...]:
        orders = self._group_orders()
        start, columns = self._position, chunk.shape[1]
        busy: list[RowGroup] = []
        steps: list[Callable[[], Coroutine[Any, Any, StepResult]]] = []
        for group, order in zip(self._groups, orders, strict=True):
            first = min(max(0, group.padding - start), columns)
            if first == columns and columns and order is None:
                continue  # nothing but padding
            rows = chunk if len(self._groups) == 1 else chunk[group.rows]
            busy.append(group)
            take_step = partial(group.session.step, every_span=with_span_outputs)
            steps.append(partial(take_step, group.as_it_travels(rows[:, first:]), group.position(start), order))
        try:
            results = self._runner.run(lambda: all_of(steps))
        except BaseException:
            if any(order is not None for order in orders):
                self.close()  # which rows were exchanged already is not known
            raise
        self._row_order = None
        return self._assemble(chunk, busy, results, with_span_outputs)

    def _assemble(
        self, chunk: torch.Tensor, busy: Sequence[RowGroup], results: Sequence[StepResult], with_span_outputs: bool
    ) -> tuple[torch.Tensor, ...]:
        """Return the output after the last span; after every one if asked for and the groups' spans are the same."""
        if not results:
            return (torch.zeros_like(chunk, device="cpu"),) * len(self._groups[0].session.route)
        self.last_timings = results[-1].timings
        self._step_timings += [timing for result in results for timing in result.timings]
        if len(self._groups) == 1 and results[0].outputs[-1].shape[1] == chunk.shape[1]:
            outputs = results[0].outputs[0 if with_span_outputs else -1 :]
            return tuple(from_wire(output).to(chunk.dtype) for output in outputs)
        is_same = len({tuple(timing.hop.span for timing in result.timings) for result in results}) == 1
        wholes = []
        for index in range(len(results[0].outputs)) if is_same and with_span_outputs else [-1]:
            whole = torch.zeros(chunk.shape, dtype=chunk.dtype)
            for group, result in zip(busy, results, strict=True):
                output = from_wire(result.outputs[index])
                whole[group.rows, chunk.shape[1] - output.shape[1] :] = output
            wholes.append(whole)
        return tuple(wholes)

    def _group_orders(self) -> list[tuple[int, ...] | None]:
        if self._row_order is None:
            return [None] * len(self._groups)
        orders: list[tuple[int, ...] | None] = []
        for group in self._groups:
            wanted = [int(self._row_order[row]) for row in group.rows]
            if not set(wanted) <= set(group.rows):
                raise InvalidRequestError("rows can only be exchanged among those with the same padding")
            order = tuple(group.rows.index(row) for row in wanted)
            orders.append(None if order == tuple(range(len(order))) else order)
        return orders


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim=1)
