"""Pure: what a client knows of the swarm of one model at a moment, for those who show it to people."""

from dataclasses import dataclass

from swarm_protocol.records import NodeRecord


@dataclass(frozen=True, slots=True)
class BlockSize:
    """Bytes that a model's largest block takes: in `dtype`, the checkpoint's, and with `--quantization nf4`."""

    dtype: str
    plain_bytes: int
    nf4_bytes: int


@dataclass(frozen=True, slots=True)
class SeenNode:
    """A node's own record, the round trip from here in seconds, and whether it did not answer when it was called.

    The round trip is None where it was not measured, as in large swarms, or is not known any more.
    """

    record: NodeRecord
    ping_s: float | None
    is_unreachable: bool


@dataclass(frozen=True, slots=True)
class ModelSwarm:
    """The nodes of a model as its client sees them at `at_s`, the swarm's clock, seconds since the epoch.

    `token_s` is what one token is expected to take on its way through the best route; None where there is no route.
    """

    name: str
    revision: str
    num_blocks: int
    at_s: float
    nodes: tuple[SeenNode, ...]
    token_s: float | None
