"""Load the blocks that this node serves and say what they cost in memory."""

import logging
import time
from collections.abc import Sequence

import torch

from server_node.compute.bitsandbytes_layers import unlisted_bytes
from server_node.compute.block_runner import BlockRunner
from server_node.compute.device import free_memory_bytes
from server_node.compute.grouped_queries import group_queries
from server_node.compute.packed_linears import pack_linears, packed_bytes
from server_node.compute.quantization import Held, Quantizer
from swarm_protocol.model.checkpoint import Checkpoint, Progress
from swarm_protocol.model.few_rows import speed_up
from swarm_protocol.model.parts import load_span
from swarm_protocol.spans import Span

_log = logging.getLogger(__name__)

PLENTIFUL_SHARE = 0.25
"""Of the memory that is free once a span is loaded: if its weights take no more, they may be there in two layouts."""


def load_blocks(
    checkpoint: Checkpoint,
    span: Span,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device,
    progress: Progress | None = None,
    scheme: Held | None = None,
    devices: Sequence[torch.device] = (),
) -> BlockRunner:
    """Return a runner of `span` on `device`; `dtype` None is the checkpoint's own.

    `devices` are those of each block, if not all lie on `device`.

    With a `scheme` the large linear layers are quantized, each block before the next one is read. Others are measured
    and made fast for decode steps. Blocks for as long as that and reading take; only the compute thread may call it.
    Raises as `load_span` does.
    """
    started_s = time.monotonic()
    quantizer = Quantizer(scheme) if scheme is not None else None
    module = load_span(
        checkpoint,
        span,
        dtype=dtype or checkpoint.dtype,
        device=device,
        progress=progress,
        on_block=quantizer,
        devices=devices,
    )
    size_bytes = module_bytes(module)
    # A CPU's memory is rarely what is short where a small span was asked for.
    keeps_plain = device.type == "cpu" and size_bytes <= PLENTIFUL_SHARE * free_memory_bytes(device)
    num_packed = pack_linears(module, keeps_plain=keeps_plain)
    num_faster = speed_up(module)
    if device.type == "cpu" and module.dtype.itemsize == 2:
        group_queries(module.blocks, module.config)
    taken_s = time.monotonic() - started_s
    _log.info("loaded %s, %.1f MB in %.1f s blocks=%s", checkpoint.name, module_bytes(module) / 1e6, taken_s, span)
    if quantizer is not None:
        _log.info("linear layers: %d quantized as %s blocks=%s", quantizer.num_layers, quantizer.scheme.label, span)
    _log.info("linear layers: %d packed, %d more with ways of their own blocks=%s", num_packed, num_faster, span)
    return BlockRunner(module)


def module_bytes(module: torch.nn.Module) -> int:
    """Return the size in bytes of a module's weights and buffers."""
    listed_bytes = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    return listed_bytes + packed_bytes(module) + unlisted_bytes(module)
