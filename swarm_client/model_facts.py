"""What a client learns of a model and its swarm without loading anything: for checks before a site is started."""

from dataclasses import dataclass

import torch

from swarm_client.block_size import block_size
from swarm_client.model import choose_dtype
from swarm_client.model_swarm import BlockSize, ModelSwarm
from swarm_client.routing.find_route import ModelKey
from swarm_client.swarm import Swarm
from swarm_protocol.model.anatomy import build_empty, find_anatomy
from swarm_protocol.model.checkpoint import Checkpoint, open_checkpoint


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model's name, the bytes of its ends as a client holds them, the size of its blocks, and its swarm now."""

    name: str
    ends_bytes: int
    block_size: BlockSize
    swarm: ModelSwarm


def ends_bytes(checkpoint: Checkpoint) -> int:
    """Return what the ends take in a client's memory: everything but the blocks, weights that are shared once."""
    dtype = choose_dtype(None, checkpoint, torch.device("cpu"))
    empty = build_empty(checkpoint.config, dtype)
    anatomy = find_anatomy(empty)
    inside = f"{anatomy.decoder}.{anatomy.blocks}."
    ends = {name: tensor for name, tensor in empty.named_parameters() if not name.startswith(inside)}
    tied = getattr(empty, "all_tied_weights_keys", None) or {}
    return sum(tensor.nbytes for name, tensor in ends.items() if tied.get(name) not in ends)


def model_facts(source: str, swarm: Swarm) -> ModelFacts:
    """Return the facts of a model. Of a hub's repository only its configuration and index are fetched.

    Raises CheckpointError, UnsupportedFamilyError, and SwarmError when the directory does not answer.
    """
    checkpoint = open_checkpoint(source)
    key = ModelKey(checkpoint.name, checkpoint.revision, checkpoint.num_blocks, checkpoint.config.model_type)
    return ModelFacts(checkpoint.name, ends_bytes(checkpoint), block_size(checkpoint), swarm.seen(key))
