"""Run what the scheduler chose: batches of decode steps, and prefills and forwards piece by piece."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from server_node.compute.backward import BackwardPass, backward_cost
from server_node.compute.batch_runner import BatchRunner, DecodeStep, Joining
from server_node.compute.block_runner import BlockRunner
from server_node.compute.kv_cache import KVCache
from server_node.compute.kv_copies import KVCopies
from server_node.compute.prefix_store import PrefixStore
from server_node.compute.scheduler import Batch, BatchLimits, Kind, Scheduler, Waiting
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
from swarm_protocol.spans import Span
from swarm_protocol.tensors import check_finite, from_wire, to_wire

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Job:
    """Work on its way. `num_done` counts the tokens of a step, or the blocks of a forward, that are through; of a
    backward pass what it has cost, as `backward_cost`.

    `has_begun` says that a prefill was not refused and may have written to its cache.

    It is finished when it has a `result` or an `error`. Only the compute thread changes it, but for `is_cancelled`.
    """

    arrival: int
    work: Work
    submitted_s: float
    is_cancelled: bool = False
    num_done: int = 0
    has_begun: bool = False
    compute_s: float = 0.0
    states: torch.Tensor | None = None
    outputs: list[torch.Tensor] = field(default_factory=list)
    backward: BackwardPass | None = None
    result: KVCache | Computed | ReadTokens | None = None
    error: BaseException | None = None

    @property
    def is_finished(self) -> bool:
        return self.result is not None or self.error is not None


class WorkRunner:
    """Chooses among jobs and runs them on one span. Only the compute thread may use it.

    `clock` is the one by which jobs are submitted, in seconds.
    """

    def __init__(
        self, runner: BlockRunner, limits: BatchLimits | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._runner = runner
        self.prefixes = PrefixStore(0)
        self._copies = KVCopies(runner)
        self._clock = clock
        self._scheduler = Scheduler(limits)
        self.batches = BatchRunner(runner)
        self.is_joining = False
        """Whether decode steps of all lengths run together, as far as that is known."""

    def probe(self) -> None:
        """Find out how decode steps run together, which takes a while the first time."""
        self.is_joining = self.batches.joining is Joining.PADDED

    def next_batch(self, jobs: Sequence[Job]) -> Batch | None:
        """Return what to run next of `jobs`, which are in order of arrival; None if nothing may run for `wait_s`."""
        num_decodes = sum(self._kind(job.work) is Kind.DECODE for job in jobs)
        if num_decodes > 1 and not self.is_joining:
            self.probe()
        return self._scheduler.next_batch([self._describe(job, num_decodes > 1) for job in jobs], self._clock())

    @property
    def wait_s(self) -> float:
        """After `next_batch` gave None though there are jobs: in how many seconds to ask again."""
        return self._scheduler.wait_s

    def run(self, jobs: Sequence[Job], batch: Batch) -> None:
        """Run the jobs of a batch. Each of them is finished then, or there is more of it to run."""
        started_s = self._clock()
        for job in jobs:
            if isinstance(job.work, StepWork) and job.work.max_tokens is not None:
                job.work.cache.extend(job.work.max_tokens)
        with torch.inference_mode():
            if batch.kind is Kind.DECODE:
                self._run_decodes(jobs)
            else:
                self._run_piece(jobs[0], batch.amount)
                for device in set(self._runner.module.places):
                    if device.type == "cuda":
                        # What a piece took counts for its peer, not for whoever waits for the device next.
                        torch.cuda.synchronize(device)
        ended_s = self._clock()
        for job in jobs:
            job.compute_s += ended_s - started_s
            if job.outputs and job.error is None and not self._is_more(job):
                _conclude(job, self._clock)
                if isinstance(job.work, StepWork) and batch.kind is Kind.PREFILL:
                    self._keep_prefix(job.work.cache)
        self._scheduler.ended(self._clock())

    def drop(self, job: Job) -> None:
        """Forget what a prefill that nobody waits for any more has written to its cache."""
        if isinstance(job.work, StepWork) and job.has_begun:
            _forget(job.work)

    def _describe(self, job: Job, with_group: bool) -> Waiting:
        work, kind = job.work, self._kind(job.work)
        if not isinstance(work, StepWork | ForwardWork | BackwardWork):
            return Waiting(job.arrival, kind, peer=work.owner, since_s=job.submitted_s)
        num_rows, num_tokens, _ = work.hidden_states.shape
        if isinstance(work, ForwardWork | BackwardWork):
            return Waiting(
                job.arrival,
                kind,
                num_rows=num_rows,
                num_tokens=num_tokens,
                num_blocks=_whole_cost(work) - job.num_done,
                peer=work.owner,
                since_s=job.submitted_s,
            )
        # The group of a single step does not matter, and finding it out may cost a probe.
        is_grouped = with_group and kind is Kind.DECODE
        # The position matters where others have to be padded to it.
        is_unpadded = is_grouped and self.batches.pads_nothing
        return Waiting(
            job.arrival,
            kind,
            id(work.cache),
            self.batches.group(work.cache, work.blocks, work.position) if is_grouped else None,
            num_rows,
            num_tokens - job.num_done,
            0 if is_unpadded else work.position,
            peer=work.owner,
            since_s=job.submitted_s,
        )

    def _kind(self, work: Work) -> Kind:
        if isinstance(work, AllocateWork):
            # Pages that are known are copied, and there may be as many as a prompt has.
            return Kind.PREFILL if work.prefix else Kind.ALLOCATE
        if isinstance(work, ReadWork | AppendWork):
            return Kind.PREFILL
        if isinstance(work, ForwardWork | BackwardWork):
            return Kind.FORWARD
        num_rows, num_tokens, _ = work.hidden_states.shape
        limits = self._scheduler.limits
        # More rows than a batch has, or copying as many keys and values, costs what a piece costs.
        is_wide = num_rows > limits.max_rows
        is_copied = work.row_order is not None and num_rows * work.cache.capacity_tokens > limits.max_padded_tokens
        return Kind.PREFILL if num_tokens > 1 or is_wide or is_copied else Kind.DECODE

    # decode steps

    def _run_decodes(self, jobs: Sequence[Job]) -> None:
        ready = [job for job in jobs if self._receive(job)]
        results = self.batches.run([_decode_step(job) for job in ready])
        for job, result in zip(ready, results, strict=True):
            if isinstance(result, Exception):
                self._fail(job, result)
            else:
                job.num_done += result.shape[1]
                job.outputs.append(result)

    # pieces

    def _run_piece(self, job: Job, amount: int) -> None:
        try:
            work = job.work
            if isinstance(work, AllocateWork):
                cache = self._runner.new_cache(work.batch_size, work.max_tokens, work.blocks)
                self.prefixes.fill(cache, work.owner, work.prefix)
                job.result = cache
            elif isinstance(work, ReadWork):
                job.result = self._copies.read(work)
            elif isinstance(work, AppendWork):
                job.result = self._copies.append(work)
            elif job.states is None and not self._receive(job):
                return
            elif isinstance(work, ForwardWork):
                self._run_forward(job, work, amount)
            elif isinstance(work, BackwardWork):
                self._run_backward(job, work, amount)
            else:
                self._run_prefill(job, work, amount)
        except Exception as error:
            self._fail(job, error)

    def _run_prefill(self, job: Job, work: StepWork, num_tokens: int) -> None:
        assert job.states is not None
        if not job.num_done:
            self._runner.begin_step(work.cache, job.states, work.position, work.blocks, work.row_order)
            job.has_begun = True
        chunk = job.states[:, job.num_done : job.num_done + num_tokens]
        job.outputs.append(self._runner.run_begun(work.cache, chunk, work.blocks))
        job.num_done += num_tokens

    def _keep_prefix(self, cache: KVCache) -> None:
        try:
            self.prefixes.keep(cache)
        except (MemoryError, RuntimeError):
            # The step itself is done; what is lost is that others could have used it. torch says RuntimeError.
            logger.warning("no memory to keep a prefix: lower --prefix-tokens", exc_info=True)

    def _run_forward(self, job: Job, work: ForwardWork, num_blocks: int) -> None:
        assert job.states is not None
        start = work.blocks.start + job.num_done
        job.states = self._runner.forward(job.states, Span(start, start + num_blocks))
        job.outputs = [job.states]
        job.num_done += num_blocks

    def _run_backward(self, job: Job, work: BackwardWork, cost: int) -> None:
        if job.backward is None:
            assert job.states is not None
            gradients = self._runner.placed(from_wire(work.gradients, self._runner.module.device))
            check_finite(gradients)
            job.backward = BackwardPass(self._runner, work.blocks, job.states, gradients)
        job.num_done += job.backward.run(cost)
        job.outputs = [job.backward.gradients]

    @staticmethod
    def _is_more(job: Job) -> bool:
        work = job.work
        assert isinstance(work, StepWork | ForwardWork | BackwardWork)
        return job.num_done < (work.hidden_states.shape[1] if isinstance(work, StepWork) else _whole_cost(work))

    def _receive(self, job: Job) -> bool:
        """Bring a job's hidden states to the device; return whether they are fit to be computed with."""
        assert isinstance(job.work, StepWork | ForwardWork | BackwardWork)
        try:
            # After the conversion: a float32 may be finite and still too large for float16.
            job.states = self._runner.placed(from_wire(job.work.hidden_states, self._runner.module.device))
            check_finite(job.states)
        except Exception as error:
            job.error = error
            return False
        return True

    def _fail(self, job: Job, error: Exception) -> None:
        # The tokens before the step are untouched: forget only what it wrote. A step that was refused wrote nothing.
        self.drop(job)
        job.error = error


def _whole_cost(work: ForwardWork | BackwardWork) -> int:
    """Return what all of it costs, in forward passes of a block."""
    return len(work.blocks) if isinstance(work, ForwardWork) else backward_cost(len(work.blocks))


def is_decode(work: StepWork) -> bool:
    """Return whether a step brings one token, or none."""
    return work.hidden_states.shape[1] <= 1


def _decode_step(job: Job) -> DecodeStep:
    work = job.work
    assert isinstance(work, StepWork)
    assert job.states is not None
    return DecodeStep(work.cache, job.states, work.position, work.blocks, work.row_order)


def _forget(work: StepWork) -> None:
    work.cache.rollback(min(work.position, work.cache.position))


def _conclude(job: Job, clock: Callable[[], float]) -> None:
    assert isinstance(job.work, StepWork | ForwardWork | BackwardWork)
    started_s = clock()
    try:
        output = job.outputs[0] if len(job.outputs) == 1 else torch.cat(job.outputs, dim=1)
        came = job.work.gradients if isinstance(job.work, BackwardWork) else job.work.hidden_states
        states = to_wire(output, came.dtype)
    except Exception as error:
        if isinstance(job.work, StepWork):
            _forget(job.work)
        job.error = error
        return
    ended_s = clock()
    job.compute_s += ended_s - started_s
    # Clocks may differ in their last digit from the sum of what they measured.
    job.result = Computed(states, max(0.0, ended_s - job.submitted_s - job.compute_s), job.compute_s)
