"""How much memory a block of a model takes, told from the model's shape alone."""

import torch
from torch import nn

from swarm_client.model_swarm import BlockSize
from swarm_protocol.model.anatomy import build_empty, find_anatomy
from swarm_protocol.model.checkpoint import Checkpoint

NF4_BITS = 5.0
"""Of a weight with its share of scales: 4.5 with bitsandbytes on CUDA, 5 with torch's own 4 bits on a CPU."""


def block_size(checkpoint: Checkpoint) -> BlockSize:
    """Return the size of the checkpoint's largest block. Nothing is loaded. Raises UnsupportedFamilyError."""
    empty = build_empty(checkpoint.config, checkpoint.dtype)
    anatomy = find_anatomy(empty)
    blocks = list(getattr(empty.get_submodule(anatomy.decoder), anatomy.blocks))
    return BlockSize(
        str(checkpoint.dtype).removeprefix("torch."),
        max(_plain_bytes(block) for block in blocks),
        max(_nf4_bytes(block) for block in blocks),
    )


def _plain_bytes(block: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*block.parameters(), *block.buffers()))


def _nf4_bytes(block: nn.Module) -> int:
    linear: list[torch.Tensor] = [module.weight for module in block.modules() if isinstance(module, nn.Linear)]
    saved = sum(weight.nbytes - weight.numel() * NF4_BITS / 8 for weight in linear)
    return _plain_bytes(block) - int(saved)
