"""Find the dtype in which a model's blocks are fastest on a device, by running some with made-up weights.

What was measured is kept beside a node's other figures, so that the choice is the same at the next start.
"""

import json
import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from server_node.compute.block_loader import load_blocks
from server_node.compute.device import hardware_name
from server_node.compute.dtype_rule import BlockTimes, candidates, fastest
from server_node.figure_store import FOLDER, read_small, write_small
from server_node.figures import MAX_AGE_S
from server_node.version import software
from swarm_protocol.model.checkpoint import Checkpoint
from swarm_protocol.model.safetensors_files import DiskRoom, StoredTensor
from swarm_protocol.spans import Span
from swarm_protocol.tensors import dtype_name

logger = logging.getLogger(__name__)

_MIN_WEIGHTS = 1_000_000
"""Of a smaller block a step is overhead, whatever the dtype."""

_MAX_MEMORY_SHARE = 0.25
"""Of the free memory, that blocks may take in all dtypes together; larger ones are not measured."""

_PROMPT_TOKENS = 128
_STEPS_PER_ROUND = 4
_NUM_ROUNDS = 6
_NUM_PROMPTS = 3
"""The best counts: what else runs on the machine only ever adds."""

_MANY_BYTES = 128 * 1024 * 1024
"""Of weights, in so many blocks: fewer could stay in the processor's cache, and blocks that are served do not."""

_PATTERN = 1 << 20
"""Made-up weights repeat after so many: making them must not take longer than measuring."""


def fastest_dtype(
    checkpoint: Checkpoint, block_weights: int, free_bytes: int, device: torch.device, folder: Path
) -> torch.dtype:
    """Return the dtype to compute in; `block_weights` are those of a block. Only the compute thread may call it.

    Files in `folder` keep what was measured.
    """
    dtypes = candidates(device.type, dtype_name(checkpoint.dtype))
    preferred: torch.dtype = getattr(torch, dtypes[0])
    if block_weights < _MIN_WEIGHTS:
        return preferred
    num_blocks = min(checkpoint.num_blocks, -(-_MANY_BYTES // (4 * block_weights)))
    all_bytes = num_blocks * block_weights * sum(getattr(torch, dtype).itemsize for dtype in dtypes)
    if all_bytes > _MAX_MEMORY_SHARE * free_bytes:
        logger.info("dtype %s: a block is too large for the free memory to try others", dtypes[0])
        return preferred
    key = _key(checkpoint, device)
    path = folder / FOLDER / f"dtype-{sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.json"
    times = times_from(read_small(path), key, dtypes, time.time())
    if times is None:
        logger.info("measuring which dtype is fastest here, once; --dtype names one")
        started_s = time.monotonic()
        times = _measure(checkpoint, dtypes, num_blocks, device)
        logger.info("dtypes were measured in %.1f s", time.monotonic() - started_s)
        kept = {"key": key, "times": {name: asdict(some) for name, some in times.items()}, "measured_s": time.time()}
        write_small(path, json.dumps(kept))
    chosen = fastest(times, dtypes)
    logger.info(
        "dtype %s: a decode step and %d tokens of a prompt take a block %s",
        chosen,
        _PROMPT_TOKENS,
        ", ".join(f"{_ms(some.decode_s)} and {_ms(some.prompt_s)} ms in {name}" for name, some in times.items()),
    )
    dtype: torch.dtype = getattr(torch, chosen)
    return dtype


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f}"


def _key(checkpoint: Checkpoint, device: torch.device) -> dict[str, Any]:
    return {
        "revision": checkpoint.revision,
        "device": hardware_name(str(device)),
        "threads": torch.get_num_threads(),
        "software": f"{software()}, torch {torch.__version__}",
    }


def times_from(
    text: str | None, key: Mapping[str, Any], dtypes: Collection[str], now_s: float
) -> dict[str, BlockTimes] | None:
    """Return what a file's text tells of `dtypes`; None if it is of something else, too old, or no such text."""
    try:
        values = json.loads(text or "")
        if values["key"] != key or not 0 <= now_s - float(values["measured_s"]) <= MAX_AGE_S:
            return None
        found = {name: BlockTimes(**values["times"][name]) for name in dtypes}
        seconds = [float(value) for some in found.values() for value in (some.decode_s, some.prompt_s)]
    except (ValueError, KeyError, TypeError):
        return None
    return found if all(math.isfinite(value) and value > 0 for value in seconds) else None


def _measure(
    checkpoint: Checkpoint, dtypes: Sequence[str], num_blocks: int, device: torch.device
) -> dict[str, BlockTimes]:
    """Return what a block takes in each dtype, in turns, so that whatever else runs slows all of them."""
    ways = {dtype: _Way(checkpoint, getattr(torch, dtype), num_blocks, device) for dtype in dtypes}
    prompts_s: dict[str, float] = dict.fromkeys(dtypes, math.inf)
    steps_s: dict[str, float] = dict.fromkeys(dtypes, math.inf)
    for turn in range(_NUM_ROUNDS):
        for dtype, way in ways.items():
            if turn < _NUM_PROMPTS:
                prompts_s[dtype] = min(prompts_s[dtype], way.run(_PROMPT_TOKENS, 0))
            for number in range(_STEPS_PER_ROUND):
                steps_s[dtype] = min(steps_s[dtype], way.run(1, _PROMPT_TOKENS + number))
    return {dtype: BlockTimes(steps_s[dtype] / num_blocks, prompts_s[dtype] / num_blocks) for dtype in dtypes}


class _Way:
    """Blocks in one dtype, ready to run."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, num_blocks: int, device: torch.device) -> None:
        self._runner = load_blocks(_MadeUp(checkpoint, dtype), Span(0, num_blocks), dtype=dtype, device=device)
        hidden_size = self._runner.module.config.hidden_size
        self._states = torch.randn(1, _PROMPT_TOKENS, hidden_size, generator=torch.Generator().manual_seed(0))
        self._cache = self._runner.new_cache(1, _PROMPT_TOKENS + _STEPS_PER_ROUND)

    def run(self, num_tokens: int, position: int) -> float:
        """Return the seconds that a step of so many tokens takes."""
        began_s = time.perf_counter()
        output = self._runner.run_step(self._cache, self._states[:, :num_tokens], position, self._runner.span)
        output.float().sum().item()  # the device has done it then
        return time.perf_counter() - began_s


@dataclass(frozen=True, slots=True)
class _MadeUp:
    """A checkpoint with another one's shapes, whose weights mean nothing and need no files."""

    real: Checkpoint
    dtype: torch.dtype

    @property
    def config(self) -> Any:
        return self.real.config

    @property
    def name(self) -> str:
        return f"{self.real.name} with made-up weights"

    @property
    def revision(self) -> str:
        return self.real.revision

    @property
    def num_blocks(self) -> int:
        return self.real.num_blocks

    def tokenizer(self) -> Any:
        raise NotImplementedError

    def generation_config(self) -> Any:
        raise NotImplementedError

    def weights(self, model: PreTrainedModel) -> Mapping[str, StoredTensor]:
        return {name: _made_up(tensor.shape, self.dtype) for name, tensor in model.state_dict().items()}

    def prepare(self, names: Collection[str]) -> None:
        """Do nothing: they are made when they are read."""

    def disk_room(self, names: Collection[str]) -> DiskRoom | None:
        return None

    def are_here(self, names: Collection[str]) -> bool:
        return True

    def conversions(self, model: PreTrainedModel) -> list[Any]:
        return []


def _made_up(shape: torch.Size, dtype: torch.dtype) -> StoredTensor:
    def make() -> torch.Tensor:
        size = shape.numel()
        pattern = 0.02 * torch.randn(min(size, _PATTERN), generator=torch.Generator().manual_seed(0))
        return pattern.to(dtype).repeat(-(-size // _PATTERN))[:size].view(shape)

    return StoredTensor(make)
