"""Measure how fast the loaded blocks are, before anybody asks for them; once, and then it is known from the disk."""

import asyncio
import logging
import time

import torch

from server_node.admission import ServedSpan
from server_node.compute.device import hardware_name
from server_node.compute.work import AllocateWork, StepWork
from server_node.compute.worker import ComputeWorker
from server_node.config import NodeConfig
from server_node.figure_store import FigureStore
from server_node.figures import Figures
from server_node.speed import SpeedMeter
from server_node.version import software
from swarm_protocol.errors import SwarmError
from swarm_protocol.model.hub import cache_folder
from swarm_protocol.tensors import to_wire

logger = logging.getLogger(__name__)

ROWS = (1, 8, 16)
"""Of the decode steps: one session, and some that share a batch."""

_NUM_STEPS = 5
"""The best one counts: the first ones find caches and kernels cold, and others may run into other programs."""

_CONTEXT_TOKENS = 32
"""In the cache before the steps, of all rows together: prompts are what takes long on a CPU."""

_PROMPT_TOKENS = 128
_QUICK_S = 0.25
"""A prompt of `_CONTEXT_TOKENS` that takes longer is not measured again with more."""

_SLOW_STEP_S = 2.0
"""After a step that takes longer, one of more rows is not measured."""


def figures_of_this_machine(config: NodeConfig) -> FigureStore:
    """Return where figures of this node's device are kept: beside what is downloaded."""
    threads = config.compute.threads or torch.get_num_threads()
    versions = f"{software()}, torch {torch.__version__}"
    return FigureStore(cache_folder(config.model.cache_dir), hardware_name(config.compute.device), threads, versions)


async def measure_speed(
    worker: ComputeWorker, served: ServedSpan, speed: SpeedMeter, store: FigureStore | None = None
) -> None:
    """Tell `speed` how fast the served blocks are, from `store` or by running prompts and steps through them.

    A span that cannot even be measured is served without figures, and found out by its first session.
    """
    num_blocks = len(served.span)
    key = None if store is None else store.key(served.model, served.numerics, num_blocks)
    figures = None if store is None or key is None else store.read(key)
    if figures is not None:
        logger.info("the speed is known from an earlier start: blocks=%s", served.span)
    else:
        started_s = asyncio.get_running_loop().time()
        try:
            figures = await _measure(worker, served)
        except SwarmError as error:
            logger.warning("the speed of blocks %s could not be measured: %s", served.span, error)
        if figures is None:
            return
        if store is not None and key is not None:
            store.write(key, figures)
        taken_s = asyncio.get_running_loop().time() - started_s
        logger.info("the speed was measured in %.2f s: blocks=%s", taken_s, served.span)
    speed.measured(figures)
    logger.info(
        "a step takes %.2f ms per block; %s steps/s with as many rows, %.1f tokens/s of prompts: blocks=%s",
        1000 * figures.decode_s[1],
        ", ".join(f"{rows}: {rate:.1f}" for rows, rate in figures.steps_per_s(num_blocks).items()),
        figures.prompt_tokens_per_s(num_blocks),
        served.span,
    )


async def _measure(worker: ComputeWorker, served: ServedSpan) -> Figures | None:
    """Return what is measured; None if the cache has no room for it. Raises SwarmError."""
    if served.cache_tokens <= _NUM_STEPS:
        return None
    num_blocks, decode_s = len(served.span), {}
    prompt_s, step_s = await _run(worker, served, 1, _CONTEXT_TOKENS, _NUM_STEPS)
    decode_s[1] = step_s / num_blocks
    if prompt_s * _CONTEXT_TOKENS <= _QUICK_S:
        prompt_s = min(prompt_s, (await _run(worker, served, 1, _PROMPT_TOKENS, 0))[0])
    for rows in ROWS[1:]:
        if step_s > _SLOW_STEP_S or rows * (_NUM_STEPS + 1) > served.cache_tokens:
            break
        _, step_s = await _run(worker, served, rows, _CONTEXT_TOKENS // rows, _NUM_STEPS)
        decode_s[rows] = step_s / num_blocks
    return Figures(decode_s, prompt_s / num_blocks, time.time())


async def _run(
    worker: ComputeWorker, served: ServedSpan, rows: int, prompt_tokens: int, num_steps: int
) -> tuple[float, float]:
    """Return the seconds of each token of a prompt, and those of a step after it, 0 without steps; both of all blocks.

    The prompt is shorter where the cache has no room for it.
    """
    prompt_tokens = min(prompt_tokens, served.cache_tokens // rows - num_steps)
    num_tokens = prompt_tokens + num_steps
    states = torch.randn(rows, num_tokens, served.hidden_size, generator=torch.Generator().manual_seed(0))
    cache = await worker.run(AllocateWork(served.span, rows, num_tokens))
    pieces = [(0, prompt_tokens), *((position, position + 1) for position in range(prompt_tokens, num_tokens))]
    took_s = []
    for start, end in pieces:
        output = await worker.run(StepWork(cache, served.span, start, to_wire(states[:, start:end])))
        took_s.append(output.compute_s)
    return took_s[0] / (rows * prompt_tokens), min(took_s[1:], default=0.0)
