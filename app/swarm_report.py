"""Pure: what the status page says of a model's swarm: whether one can chat, what is missing, and what would help.

    loading, failed   the site has not opened the model, or could not
    unknown           the swarm could not be looked at
    down              no block is served
    incomplete        some blocks are served by nobody: no answers until somebody takes them
    degraded          one can chat, but some blocks are with one node only, whose end would stop answers
    ready             every block is with two nodes or more

Names and versions are strangers' words: what is kept of them is short, printable, and holds no address.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from swarm_client.model_swarm import BlockSize, ModelSwarm, SeenNode
from swarm_protocol.records import NodeRecord
from swarm_protocol.spans import Span

SwarmStatus = Literal["ready", "degraded", "incomplete", "down", "loading", "failed", "unknown"]
NodeStatus = Literal["online", "joining", "draining", "offline", "unreachable", "other_weights"]

CACHE_FACTOR = 1.5
"""Memory that a node wants for each byte of blocks: unless told otherwise it leaves a third for KV cache."""

MAX_NODES = 300
"""Rows of the table and bars of the picture; the nodes that serve come first. A swarm of 80 blocks has tens."""

MAX_NAME_CHARS = 40

_ADDRESS = re.compile(r"\d{1,3}(?:\.\d{1,3}){3}|[0-9a-fA-F]{0,4}:[0-9a-fA-F]{0,4}:|/(?:ip[46]|dns|tcp|udp|p2p)")
_VERSION = re.compile(r"umbel ((\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?(?:[a-z.+-][a-z0-9.+-]{0,15})?)", re.ASCII)
_DTYPES = ("float32", "bfloat16", "float16")
_QUANTIZATIONS = {"int8": "int8", "int4": "4-bit", "nf4": "4-bit"}
_ORDER: tuple[NodeStatus, ...] = ("online", "draining", "joining", "unreachable", "other_weights", "offline")


@dataclass(frozen=True, slots=True)
class NodeReport:
    """One node as it is shown. `short_id` is the end of its peer id; `cache_free` a share, None where none is told.

    `tokens_per_s` is what the node's blocks can do for one session. `quantization` is None for plain weights.
    """

    short_id: str
    name: str
    blocks: Span
    state: NodeStatus
    dtype: str
    quantization: str | None
    tokens_per_s: float | None
    cache_free: float | None
    free_tokens: int
    ping_s: float | None
    version: str
    is_outdated: bool


@dataclass(frozen=True, slots=True)
class Needed:
    """Memory that would complete the model: its blocks as they are in the checkpoint's `dtype`, and with nf4."""

    num_blocks: int
    dtype: str
    plain_bytes: int
    nf4_bytes: int


@dataclass(frozen=True, slots=True)
class ModelReport:
    """One model. `replicas` says for each block how many nodes serve it; `weakest` are the blocks with the fewest.

    `tokens_per_s` was measured lately if `is_measured`, else reckoned from the best route; None where one cannot chat.
    `queue` counts generations that wait at this site. `num_nodes` counts all, `nodes` may be fewer.
    """

    name: str
    state: SwarmStatus
    context_length: int | None = None
    replicas: tuple[int, ...] = ()
    missing: tuple[Span, ...] = ()
    single: tuple[Span, ...] = ()
    weakest: tuple[Span, ...] = ()
    tokens_per_s: float | None = None
    is_measured: bool = False
    queue: int = 0
    needed: Needed | None = None
    nodes: tuple[NodeReport, ...] = ()
    num_nodes: int = 0

    @property
    def can_chat(self) -> bool:
        """Whether answers come now."""
        return self.state in ("ready", "degraded")

    @property
    def num_blocks(self) -> int:
        """How many blocks the model has; 0 where that is not known."""
        return len(self.replicas)

    @property
    def min_replicas(self) -> int:
        """The nodes of the block that has the fewest."""
        return min(self.replicas, default=0)


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What is known of a model besides its nodes. `measured_tokens_per_s` is that of a recent generation."""

    context_length: int
    queue: int
    measured_tokens_per_s: float | None
    own_version: str


def model_report(swarm: ModelSwarm, block_size: BlockSize, circumstances: Circumstances) -> ModelReport:
    """Return what to say of a model whose swarm was seen."""
    serving = [node.record.span for node in swarm.nodes if _status(node, swarm.revision) == "online"]
    replicas = count_replicas(serving, swarm.num_blocks)
    missing = runs(replicas, lambda count: count == 0)
    measured, token_s = circumstances.measured_tokens_per_s, swarm.token_s
    state = swarm_status(replicas)
    speed = measured if measured is not None else 1 / token_s if token_s else None
    has_speed = state in ("ready", "degraded") and speed is not None
    nodes = sorted(
        (_node_report(node, swarm.revision, circumstances.own_version) for node in swarm.nodes),
        key=lambda node: (_ORDER.index(node.state), node.blocks, node.short_id),
    )
    return ModelReport(
        name=swarm.name,
        state=state,
        context_length=circumstances.context_length,
        replicas=replicas,
        missing=missing,
        single=runs(replicas, lambda count: count == 1),
        weakest=() if len(set(replicas)) < 2 else runs(replicas, lambda count: count == min(replicas)),
        tokens_per_s=speed if has_speed else None,
        is_measured=has_speed and measured is not None,
        queue=circumstances.queue,
        needed=needed(missing, block_size),
        nodes=tuple(nodes[:MAX_NODES]),
        num_nodes=len(nodes),
    )


def count_replicas(spans: Sequence[Span], num_blocks: int) -> tuple[int, ...]:
    """Return for each block how many of `spans` hold it; what lies beyond the model counts nowhere."""
    changes = [0] * (num_blocks + 1)
    for span in spans:
        changes[min(span.start, num_blocks)] += 1
        changes[min(span.end, num_blocks)] -= 1
    counts, count = [], 0
    for change in changes[:num_blocks]:
        count += change
        counts.append(count)
    return tuple(counts)


def runs(replicas: Sequence[int], is_meant: Callable[[int], bool]) -> tuple[Span, ...]:
    """Return the longest runs of blocks whose count is meant, in order."""
    found: list[Span] = []
    for block, count in enumerate(replicas):
        if not is_meant(count):
            continue
        if found and found[-1].end == block:
            found[-1] = Span(found[-1].start, block + 1)
        else:
            found.append(Span(block, block + 1))
    return tuple(found)


def swarm_status(replicas: Sequence[int]) -> SwarmStatus:
    """Return the state of a swarm whose blocks are held so many times."""
    if not any(replicas):
        return "down"
    fewest = min(replicas)
    return "incomplete" if fewest == 0 else "degraded" if fewest == 1 else "ready"


def needed(missing: Sequence[Span], size: BlockSize) -> Needed | None:
    """Return what would complete a model; None where nothing is missing."""
    num_blocks = sum(len(span) for span in missing)
    if not num_blocks:
        return None
    plain, nf4 = (round(num_blocks * each * CACHE_FACTOR) for each in (size.plain_bytes, size.nf4_bytes))
    return Needed(num_blocks, size.dtype, plain, nf4)


def clean_text(text: str, most: int = MAX_NAME_CHARS) -> str:
    """Return a stranger's text as one visible line; empty if something in it looks like an address."""
    shown = " ".join("".join(char if char.isprintable() else " " for char in text).split())[:most].rstrip()
    return "" if _ADDRESS.search(shown) else shown


def clean_version(software: str) -> str:
    """Return the version in a record's `software`; empty if it names none in the usual way."""
    found = _VERSION.fullmatch(software)
    return found[1] if found and not _ADDRESS.search(found[1]) else ""


def is_older(software: str, own: str) -> bool:
    """Return whether a node's program is older than the site's; what cannot be compared is not."""
    theirs, ours = _VERSION.fullmatch(software), _VERSION.fullmatch(f"umbel {own}")
    if theirs is None or ours is None:
        return False
    return _numbers(theirs) < _numbers(ours)


def _numbers(found: re.Match[str]) -> tuple[int, ...]:
    return tuple(int(part or 0) for part in found.groups()[1:])


def _status(node: SeenNode, revision: str) -> NodeStatus:
    if node.record.revision != revision:
        return "other_weights"
    if node.is_unreachable and node.record.state == "online":
        return "unreachable"
    return node.record.state


def _node_report(node: SeenNode, revision: str, own_version: str) -> NodeReport:
    record = node.record
    seconds = (record.block_step_s or 0.0) * len(record.span)
    return NodeReport(
        short_id=record.peer_id[-6:],
        name=clean_text(record.name),
        blocks=record.span,
        state=_status(node, revision),
        dtype=record.dtype if record.dtype in _DTYPES else "",
        quantization=_quantization(record),
        tokens_per_s=1 / seconds if seconds > 0 else None,
        cache_free=min(1.0, record.free_tokens / record.max_tokens) if record.max_tokens else None,
        free_tokens=record.free_tokens,
        ping_s=node.ping_s,
        version=clean_version(record.software),
        is_outdated=is_older(record.software, own_version),
    )


def _quantization(record: NodeRecord) -> str | None:
    """Return how a node holds its weights, as the end of its numerics says: `…/bfloat16/int4-g32/cpu`."""
    for part in record.numerics.split("/")[-2:]:
        found = _QUANTIZATIONS.get(part.partition("-")[0])
        if found:
            return found
    return None
