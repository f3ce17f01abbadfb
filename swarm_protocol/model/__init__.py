"""Checkpoints, and the spans and ends that are cut out of them."""

from swarm_protocol.model.checkpoint import Checkpoint, open_checkpoint
from swarm_protocol.model.parts import EndsModule, SpanModule, build_client_model, load_ends, load_span

__all__ = [
    "Checkpoint",
    "EndsModule",
    "SpanModule",
    "build_client_model",
    "load_ends",
    "load_span",
    "open_checkpoint",
]
