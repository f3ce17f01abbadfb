"""Measure how fast the loaded blocks are, before anybody asks for them."""

import asyncio
import logging

import torch

from server_node.admission import ServedSpan
from server_node.compute.work import AllocateWork, Computed, StepWork
from server_node.compute.worker import ComputeWorker
from server_node.speed import SpeedMeter
from swarm_protocol.errors import SwarmError
from swarm_protocol.tensors import to_wire

logger = logging.getLogger(__name__)

_PROMPT_TOKENS = 32
_NUM_STEPS = 5
"""The first ones find caches and kernels cold; the median does not."""


async def measure_speed(worker: ComputeWorker, served: ServedSpan, speed: SpeedMeter) -> None:
    """Run a short prompt and some steps through the served blocks, and count one of either kind in `speed`.

    A span that cannot even be measured is served without figures, and found out by its first session.
    """
    num_tokens = min(served.cache_tokens, _PROMPT_TOKENS + _NUM_STEPS)
    prompt_tokens = num_tokens - _NUM_STEPS
    if prompt_tokens < 1:
        return
    states = torch.randn(1, num_tokens, served.hidden_size, generator=torch.Generator().manual_seed(0))
    pieces = [(0, prompt_tokens), *((position, position + 1) for position in range(prompt_tokens, num_tokens))]
    try:
        cache = await worker.run(AllocateWork(served.span, 1, num_tokens))
        outputs = []
        for start, end in pieces:
            outputs.append(await worker.run(StepWork(cache, served.span, start, to_wire(states[:, start:end]))))
    except SwarmError as error:
        logger.warning("the speed of blocks %s could not be measured: %s", served.span, error)
        return
    now_s = asyncio.get_running_loop().time()
    step = sorted(outputs[1:], key=lambda output: output.compute_s)[_NUM_STEPS // 2]
    for output in (outputs[0], step):
        speed.ran(Computed(output.hidden_states, 0.0, output.compute_s), len(served.span), now_s)
    logger.info("a step takes %.2f ms per block: blocks=%s", 1000 * step.compute_s / len(served.span), served.span)
