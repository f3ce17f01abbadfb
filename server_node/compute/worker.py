"""Where the event loop and the thread that owns the device meet.

The loop submits work and awaits the result; one thread does it in the order of submission. Everything that touches
tensors happens there, from the bytes that arrived to the bytes that leave, so that the loop never computes. Work is
described, not passed as a closure, so that whoever orders it can see what it is.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, overload

import torch

from server_node.compute.block_loader import load_blocks, module_bytes
from server_node.compute.block_runner import BlockRunner
from server_node.compute.kv_cache import KVCache, kv_bytes_per_token
from swarm_protocol.errors import ConfigError, LimitExceededError, SwarmError
from swarm_protocol.messages import WireTensor
from swarm_protocol.model.anatomy import build_empty, find_anatomy
from swarm_protocol.model.checkpoint import Checkpoint, Progress, open_checkpoint
from swarm_protocol.spans import Span
from swarm_protocol.tensors import check_finite, dtype_name, from_wire, to_wire

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEVICE_THREAD = "device"
"""What the device thread's name starts with."""

_NO_LIMIT = 1 << 62


@dataclass(frozen=True, slots=True)
class AllocateWork:
    """Make an empty KV cache for a session."""

    blocks: Span
    batch_size: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class StepWork:
    """Run one step of a session over its cache; as `messages.Step`."""

    cache: KVCache
    blocks: Span
    position: int
    hidden_states: WireTensor
    row_order: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class ForwardWork:
    """Run whole sequences through some blocks, without a cache."""

    blocks: Span
    hidden_states: WireTensor


@dataclass(frozen=True, slots=True)
class Computed:
    """The output in the dtype of the input, how long the work waited, and how long it took."""

    hidden_states: WireTensor
    queue_s: float
    compute_s: float


Work = AllocateWork | StepWork | ForwardWork


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A checkpoint, and what one of its blocks takes on the device in the dtype that was chosen for it."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    device_type: str
    block_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class LoadedSpan:
    """What loading found out: `free_bytes` is the memory that is left on the device."""

    hidden_size: int
    dtype: str
    kv_bytes_per_token: int
    free_bytes: int


class ComputeWorker:
    """The device thread of a node, as the event loop sees it.

    `executor` runs one thing at a time, in order; tests pass one that does it at once. `num_threads` is how many
    threads torch may use on a CPU, None for its own choice. `max_queued` bounds the work that waits or runs.
    """

    def __init__(
        self,
        executor: Executor | None = None,
        *,
        runner: BlockRunner | None = None,
        num_threads: int | None = None,
        max_queued: int = 512,
    ) -> None:
        self._executor = executor or ThreadPoolExecutor(
            1, thread_name_prefix=DEVICE_THREAD, initializer=_use_threads, initargs=(num_threads,)
        )
        self._runner = runner
        self._max_queued = max_queued
        self._num_queued = 0

    async def open_model(
        self, source: str, *, revision: str | None, cache_dir: str | None, device: str, dtype: str
    ) -> OpenedModel:
        """Open a checkpoint and measure a block. Raises ModelError; ConfigError for an unusable device or dtype."""
        return await self._submit(_open_model, source, revision, cache_dir, device, dtype)

    async def load(self, model: OpenedModel, span: Span, device: str, progress: Progress | None) -> LoadedSpan:
        """Load the blocks that are to be served. `progress` is called on the device thread. Raises ModelError."""
        return await self._submit(self._load, model, span, device, progress)

    @overload
    async def run(self, work: AllocateWork) -> KVCache: ...
    @overload
    async def run(self, work: StepWork | ForwardWork) -> Computed: ...
    async def run(self, work: Work) -> KVCache | Computed:
        """Do `work` on the device and return its result.

        Raises LimitExceededError if too much waits, InvalidTensorError for values that are not finite, and what
        `BlockRunner` raises.
        """
        if self._num_queued >= self._max_queued:
            raise LimitExceededError(f"{self._num_queued} steps wait for this node's device, which is the limit")
        self._num_queued += 1
        try:
            return await self._submit(self._do, work, time.perf_counter())
        finally:
            self._num_queued -= 1

    def close(self) -> None:
        """Drop what waits; what runs ends by itself."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _submit(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    def _load(self, model: OpenedModel, span: Span, device: str, progress: Progress | None) -> LoadedSpan:
        try:
            runner = load_blocks(
                model.checkpoint, span, dtype=model.dtype, device=torch.device(device), progress=progress
            )
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ConfigError(f"the blocks {span} do not fit into the memory of {device}: serve fewer") from error
        self._runner = runner
        config = runner.module.config
        return LoadedSpan(
            hidden_size=config.hidden_size,
            dtype=dtype_name(model.dtype),
            kv_bytes_per_token=kv_bytes_per_token(model.checkpoint.config, span, model.dtype),
            free_bytes=free_memory_bytes(torch.device(device)),
        )

    def _do(self, work: Work, submitted_s: float) -> KVCache | Computed:
        if self._runner is None:
            raise RuntimeError("no blocks are loaded")
        if isinstance(work, AllocateWork):
            return self._runner.new_cache(work.batch_size, work.max_tokens, work.blocks)
        started_s = time.perf_counter()
        with torch.inference_mode():
            output = self._run_blocks(self._runner, work)
            output_states = to_wire(output)
        return Computed(output_states, started_s - submitted_s, time.perf_counter() - started_s)

    @staticmethod
    def _run_blocks(runner: BlockRunner, work: StepWork | ForwardWork) -> torch.Tensor:
        received = from_wire(work.hidden_states)
        # After the conversion: a float32 may be finite and still too large for float16.
        hidden_states = received.to(device=runner.module.device, dtype=runner.module.dtype)
        check_finite(hidden_states)
        if isinstance(work, ForwardWork):
            return runner.forward(hidden_states, work.blocks).to(received.dtype)
        try:
            output = runner.run_step(work.cache, hidden_states, work.position, work.blocks, work.row_order)
        except SwarmError:
            raise
        except BaseException:
            # The tokens before the step are untouched (see `BlockRunner.run_step`): forget only what it wrote.
            work.cache.rollback(min(work.position, work.cache.position))
            raise
        return output.to(received.dtype)


def _open_model(source: str, revision: str | None, cache_dir: str | None, device: str, dtype: str) -> OpenedModel:
    target = usable_device(device)
    checkpoint = open_checkpoint(source, revision=revision, cache_dir=cache_dir)
    chosen = _chosen_dtype(dtype, checkpoint, target)
    empty = build_empty(checkpoint.config, chosen)
    anatomy = find_anatomy(empty)
    # Families with layers of several kinds differ by block: the largest one stands for all.
    block_bytes = max(module_bytes(block) for block in getattr(empty.get_submodule(anatomy.decoder), anatomy.blocks))
    return OpenedModel(checkpoint, chosen, target.type, block_bytes, free_memory_bytes(target))


def _use_threads(num_threads: int | None) -> None:
    if num_threads is not None:
        torch.set_num_threads(num_threads)


def usable_device(device: str) -> torch.device:
    """Return the torch device called `device`. Raises ConfigError if this machine has none such."""
    try:
        target = torch.device(device)
        if target.type == "meta":
            raise NotImplementedError("it holds no values")
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {device!r} cannot be used here: {reason}") from error
    return target


def _chosen_dtype(dtype: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    return torch.float32 if device.type == "cpu" else checkpoint.dtype


def free_memory_bytes(device: torch.device) -> int:
    """Return the memory that new tensors on `device` can take. Raises ConfigError where nothing tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        import psutil
    except ImportError as error:
        raise ConfigError("how much memory is free is unknown without psutil: pip install 'umbel[node]'") from error
    return min(int(psutil.virtual_memory().available), _container_memory_bytes())


def _container_memory_bytes() -> int:
    """Return what is left of the container's own limit (cgroup v2), which the machine's figures do not know."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii").strip()
        return max(0, int(limit) - int(used)) if limit != "max" else _NO_LIMIT
    except (OSError, ValueError):
        return _NO_LIMIT
