"""Where the event loop and the thread that owns the device meet.

The loop submits work and awaits the result. What waits is in one list that both sides see under a lock; one turn of the
device thread after another takes what the scheduler chooses from it and runs it, until nothing waits. Everything that
touches tensors happens there, from the bytes that arrived to the bytes that leave, so that the loop never computes.

When all that waits are decode steps, and others are about to come that could run with them, the device is left idle for
some milliseconds (`gathering.py` says how long); the loop's timer ends that, or the next step that comes.
"""

import asyncio
import gc
import logging
import sys
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar, overload

import torch

from server_node.compute.block_loader import load_blocks
from server_node.compute.block_runner import BlockRunner
from server_node.compute.device import device_rooms, usable_devices
from server_node.compute.device_plan import cache_room_bytes, split_blocks
from server_node.compute.gathering import Gathering
from server_node.compute.kv_cache import KVCache, kv_bytes_per_token
from server_node.compute.opened_model import OpenedModel, open_model
from server_node.compute.scheduler import Batch, BatchLimits, Kind
from server_node.compute.work import (
    AllocateWork,
    AppendWork,
    BackwardWork,
    Computed,
    ForwardWork,
    ReadTokens,
    ReadWork,
    StepWork,
    Work,
)
from server_node.compute.work_runner import Job, WorkRunner, is_decode
from server_node.config import ModelChoice
from swarm_protocol.errors import ConfigError, LimitExceededError
from swarm_protocol.model.checkpoint import Progress
from swarm_protocol.spans import Span
from swarm_protocol.tensors import dtype_name

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEVICE_THREAD = "device"
"""What the device thread's name starts with."""

_SWITCH_S = 0.0005
"""For the event loop to leave the interpreter to the device thread."""


@dataclass(frozen=True, slots=True)
class LoadedSpan:
    """What loading found out: `free_bytes` is the memory that is left for caches: where there are several
    devices, as much as the fullest of them has for each of its blocks."""

    hidden_size: int
    dtype: str
    kv_bytes_per_token: int
    free_bytes: int


@dataclass(slots=True, eq=False)
class _Ticket:
    """A job and who waits for it."""

    job: Job
    waiter: "asyncio.Future[KVCache | Computed | ReadTokens]"


class ComputeWorker:
    """The device thread of a node, as the event loop sees it.

    `executor` runs one thing at a time, in order; tests pass one that does it at once. `num_threads` is how many
    threads torch may use on a CPU, None for its own choice. `max_queued` bounds the work that waits or runs. `clock` is
    in seconds and must not go back.
    """

    def __init__(
        self,
        executor: Executor | None = None,
        *,
        runner: BlockRunner | None = None,
        num_threads: int | None = None,
        max_queued: int = 512,
        limits: BatchLimits | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock = clock
        self._executor = executor or ThreadPoolExecutor(
            1, thread_name_prefix=DEVICE_THREAD, initializer=_begin_device_thread, initargs=(num_threads,)
        )
        self._limits = limits
        self._runner = WorkRunner(runner, limits, clock) if runner is not None else None
        self._max_queued = max_queued
        self._num_queued = 0
        self._num_submitted = 0
        self._lock = threading.Lock()
        # Guarded by the lock: what waits or runs, by arrival, and whether somebody is to look at it.
        self._tickets: dict[int, _Ticket] = {}
        self._is_turning = False
        self._gathering = Gathering()
        # The loop's own: what runs, and the end of a hold.
        self._turn: asyncio.Future[None] | None = None
        self._held: asyncio.TimerHandle | None = None
        self._next_look: asyncio.TimerHandle | None = None

    async def open_model(
        self,
        choice: ModelChoice,
        *,
        device: str,
        dtype: str,
        quantization: str = "none",
        on_download: Progress | None = None,
    ) -> OpenedModel:
        """Open a checkpoint and measure a block. `on_download` counts bytes on the device thread, also while it loads.

        Raises ModelError; ConfigError for an unusable device or dtype, and for a quantization that it cannot do.
        """
        return await self._submit(open_model, choice, device, dtype, quantization, on_download)

    async def load(self, model: OpenedModel, span: Span, device: str, progress: Progress | None) -> LoadedSpan:
        """Load the blocks that are to be served. `progress` is called on the device thread. Raises ModelError."""
        return await self._submit(self._load, model, span, device, progress)

    async def unload(self, model: OpenedModel, device: str) -> OpenedModel:
        """Give the memory of the blocks back, once nothing runs; return `model` with what is free then."""
        return await self._submit(self._unload, model, device)

    def keep_prefixes(self, max_bytes: int) -> None:
        """From now on keep so much of sessions' prefixes, for later sessions. Once a load, before any work."""
        if self._runner is None:
            raise RuntimeError("no blocks are loaded")
        self._runner.prefixes.max_bytes = max_bytes

    @overload
    async def run(self, work: AllocateWork | AppendWork) -> KVCache: ...
    @overload
    async def run(self, work: ReadWork) -> ReadTokens: ...
    @overload
    async def run(self, work: StepWork | ForwardWork | BackwardWork) -> Computed: ...
    async def run(self, work: Work) -> KVCache | Computed | ReadTokens:
        """Do `work` on the device and return its result.

        Raises LimitExceededError if too much waits, InvalidTensorError for values that are not finite, and what
        `BlockRunner` raises.
        """
        if self._runner is None:
            raise RuntimeError("no blocks are loaded")
        if self._num_queued >= self._max_queued:
            raise LimitExceededError(f"{self._num_queued} steps wait for this node's device, which is the limit")
        self._num_queued += 1
        self._num_submitted += 1
        ticket = _Ticket(Job(self._num_submitted, work, self._clock()), asyncio.get_running_loop().create_future())
        try:
            self._enqueue(ticket)
            return await ticket.waiter
        finally:
            self._num_queued -= 1
            self._withdraw(ticket)

    def close(self) -> None:
        """Drop what waits; what runs ends by itself."""
        if self._held is not None:
            self._held.cancel()
        if self._next_look is not None:
            self._next_look.cancel()
        with self._lock:
            dropped = list(self._tickets.values())
            self._tickets.clear()
        for ticket in dropped:
            ticket.job.is_cancelled = True
            ticket.waiter.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)

    # the loop's side of the list

    def _enqueue(self, ticket: _Ticket) -> None:
        with self._lock:
            self._tickets[ticket.job.arrival] = ticket
            work = ticket.job.work
            if isinstance(work, StepWork) and is_decode(work):
                self._gathering.arrived(id(work.cache), work.blocks, ticket.job.submitted_s)
            is_first, self._is_turning = not self._is_turning, True
        if is_first:
            # Not before the loop's next turn: steps that are submitted in this one shall run together.
            ticket.waiter.get_loop().call_soon(self._gather)
        elif self._held is not None:
            self._held.cancel()
            self._held = ticket.waiter.get_loop().call_later(0, self._gather)

    def _withdraw(self, ticket: _Ticket) -> None:
        """Take work out of the list that nobody waits for any more."""
        with self._lock:
            ticket.job.is_cancelled = True
            # Once pieces of it have run, the device thread has to clean up after it.
            if not ticket.job.num_done:
                self._tickets.pop(ticket.job.arrival, None)
            is_left_over = ticket.job.arrival in self._tickets
        if is_left_over:
            self._look_again()

    def _gather(self) -> None:
        """Let the device thread begin, now or after a hold. It does not run now."""
        with self._lock:
            hold_s = self._hold_s()
        if hold_s > 0:
            self._held = asyncio.get_running_loop().call_later(hold_s, self._start_turns)
        else:
            self._start_turns()

    def _hold_s(self) -> float:
        """Return how long to hold what waits. Called under the lock, by either side."""
        waiting: dict[Hashable, float] = {}
        for ticket in self._tickets.values():
            work = ticket.job.work
            if not isinstance(work, StepWork) or not is_decode(work):
                return 0.0
            waiting.setdefault(id(work.cache), ticket.job.submitted_s)
        is_joining = self._runner is not None and self._runner.is_joining
        return self._gathering.hold_s(waiting, self._clock()) if is_joining else 0.0

    def _look_again_in(self, wait_s: float) -> None:
        if self._next_look is not None:
            self._next_look.cancel()
        self._next_look = asyncio.get_running_loop().call_later(wait_s, self._look_again)

    def _look_again(self) -> None:
        with self._lock:
            is_idle, self._is_turning = not self._is_turning, True
        if is_idle:
            self._start_turns()

    def _start_turns(self) -> None:
        self._held = None
        with self._lock:
            self._is_turning = bool(self._tickets)  # what was held may be withdrawn, or the worker closed
        if not self._is_turning:
            return
        self._turn = asyncio.get_running_loop().run_in_executor(self._executor, self._take_turns)
        self._turn.add_done_callback(self._turns_ended)

    def _turns_ended(self, turn: "asyncio.Future[None]") -> None:
        error = None if turn.cancelled() else turn.exception()
        if error is None:
            return
        with self._lock:
            failed = list(self._tickets.values())
            self._tickets.clear()
            self._is_turning = False
        for ticket in failed:
            ticket.job.error = error
        _deliver(failed)

    # the device thread's side

    def _take_turns(self) -> None:
        """Run what waits until nothing does."""
        runner = self._runner
        assert runner is not None
        has_run = False
        while True:
            with self._lock:
                tickets = dict(self._tickets)
                if not tickets:
                    self._is_turning = False
                    return
                is_held = has_run and self._hold_s() > 0
            if is_held:
                _call_on(tickets[min(tickets)].waiter.get_loop(), self._gather)
                return
            has_run = True
            dropped = [ticket for ticket in tickets.values() if ticket.job.is_cancelled]
            batch = runner.next_batch([ticket.job for ticket in tickets.values() if not ticket.job.is_cancelled])
            chosen = [tickets[arrival] for arrival in batch.arrivals] if batch else []
            started_s = self._clock()
            if batch:
                runner.run([ticket.job for ticket in chosen], batch)
                logger.debug("ran %d of %d that wait: %s", len(chosen), len(tickets), batch.kind.value)
            self._put_away(runner, dropped, chosen, batch, started_s)
            if not batch and not dropped and self._has_rested(tickets, runner.wait_s):
                return

    def _has_rested(self, tickets: dict[int, _Ticket], wait_s: float) -> bool:
        """End the turns for `wait_s`, or until more work comes, unless it has come already."""
        with self._lock:
            if any(arrival not in tickets or ticket.job.is_cancelled for arrival, ticket in self._tickets.items()):
                return False
            self._is_turning = False
        loop = next(iter(tickets.values())).waiter.get_loop()
        _call_on(loop, self._look_again_in, wait_s)
        return True

    def _put_away(
        self, runner: WorkRunner, dropped: list[_Ticket], ran: list[_Ticket], batch: Batch | None, started_s: float
    ) -> None:
        now_s = self._clock()
        finished = [ticket for ticket in ran if ticket.job.is_finished]
        dropped = dropped + [ticket for ticket in ran if ticket.job.is_cancelled and not ticket.job.is_finished]
        for ticket in dropped:
            runner.drop(ticket.job)
        with self._lock:
            for ticket in (*dropped, *finished):
                self._tickets.pop(ticket.job.arrival, None)
            if batch is not None and batch.kind is Kind.DECODE:
                sessions = [id(ticket.job.work.cache) for ticket in finished if isinstance(ticket.job.work, StepWork)]
                self._gathering.answered(sessions, now_s - started_s, now_s)
        if finished:
            # In one go, so that the sessions' next steps come together, too.
            _call_on(finished[0].waiter.get_loop(), _deliver, finished)

    async def _submit(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    def _unload(self, model: OpenedModel, device: str) -> OpenedModel:
        self._runner = None
        gc.collect()  # blocks and what runs them may refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        rooms = device_rooms(usable_devices(device))
        return replace(model, free_bytes=sum(room.free_bytes for room in rooms), rooms=rooms)

    def _load(self, model: OpenedModel, span: Span, device: str, progress: Progress | None) -> LoadedSpan:
        targets = usable_devices(device)
        counts = split_blocks(len(span), model.block_bytes, model.loadable_bytes)
        places = [target for target, count in zip(targets, counts, strict=True) for _ in range(count)]
        if len(targets) > 1:
            logger.info("blocks by device: %s blocks=%s", _by_device(targets, counts), span)
        try:
            runner = load_blocks(
                model.checkpoint,
                span,
                dtype=model.dtype,
                device=places[0],
                devices=places,
                progress=progress,
                scheme=model.scheme,
            )
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ConfigError(f"the blocks {span} do not fit into the memory of {device}: serve fewer") from error
        self._runner = WorkRunner(runner, self._limits, self._clock)
        # Asked here so that no session waits for the probe.
        self._runner.probe()
        config = runner.module.config
        return LoadedSpan(
            hidden_size=config.hidden_size,
            dtype=dtype_name(model.dtype),
            kv_bytes_per_token=kv_bytes_per_token(model.checkpoint.config, span, model.dtype),
            free_bytes=cache_room_bytes(counts, [room.free_bytes for room in device_rooms(targets)]),
        )


def _by_device(devices: Sequence[torch.device], counts: Sequence[int]) -> str:
    return ", ".join(f"{count} on {device}" for device, count in zip(devices, counts, strict=True))


def _call_on(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        logger.debug("the loop ended before the device thread did")


def _deliver(finished: list[_Ticket]) -> None:
    for ticket in finished:
        job, waiter = ticket.job, ticket.waiter
        if waiter.done():
            continue
        if job.error is not None:
            waiter.set_exception(job.error)
        elif job.result is not None:
            waiter.set_result(job.result)


def _begin_device_thread(num_threads: int | None) -> None:
    # A forward asks for the interpreter at each of its thousand operations, which a busy event loop gives up only so
    # often: with Python's own 5 ms a flood of new streams made a step of 55 ms take 1 to 2 s.
    sys.setswitchinterval(_SWITCH_S)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
