"""Pure: choose the nodes that a session goes through."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from swarm_protocol.errors import MissingBlocksError, RevisionMismatchError
from swarm_protocol.ids import PeerId
from swarm_protocol.records import NodeRecord
from swarm_protocol.spans import Span, uncovered


@dataclass(frozen=True, slots=True)
class Hop:
    """The blocks that a route runs at one peer; they may be fewer than the peer serves. `numerics` as in its record."""

    peer_id: PeerId
    span: Span
    numerics: str = ""


@dataclass(frozen=True, slots=True)
class ModelKey:
    """Which model a route is for: the name in records, the revision of the weights, and the number of blocks."""

    name: str
    revision: str
    num_blocks: int


def find_route(
    records: Iterable[NodeRecord],
    model: ModelKey,
    *,
    needed_tokens: int,
    avoided: Collection[PeerId],
    choose: Callable[[Sequence[NodeRecord]], NodeRecord],
    span: Span | None = None,
) -> list[Hop]:
    """Return the hops of a route through `span`, or all blocks, with the fewest nodes; `choose` picks among equal ones.

    Going on with the node that reaches furthest gives the fewest, since spans are intervals. Nodes in `avoided`, and
    those whose record says that fewer than `needed_tokens` are free, are used only for blocks that nobody else serves:
    a node that failed or was full a moment ago may be well again, and is the one to say so.

    Raises RevisionMismatchError if the blocks are served, but with other weights; MissingBlocksError, which names the
    blocks, if some are not served at all.
    """
    online = [r for r in records if r.state == "online" and r.model == model.name]
    same = [r for r in online if r.revision == model.revision]
    wanted = span or Span(0, model.num_blocks)
    holes = _holes(same, model, wanted)
    if holes:
        if not _holes(online, model, wanted):
            raise RevisionMismatchError(
                f"the swarm serves {model.name} with other weights: revision {online[0].revision}, "
                f"this client has {model.revision}"
            )
        raise MissingBlocksError(model.name, holes)
    roomy = [r for r in same if r.free_tokens >= needed_tokens]
    trusted = [r for r in roomy if r.peer_id not in avoided]
    hops: list[Hop] = []
    block = wanted.start
    while block < wanted.end:
        record = next(filter(None, (_furthest(some, block, choose) for some in (trusted, roomy, same))), None)
        if record is None:
            raise AssertionError("coverage was checked above")
        end = min(record.end_block, wanted.end)
        hops.append(Hop(PeerId(record.peer_id), Span(block, end), record.numerics))
        block = end
    return hops


def _holes(records: Sequence[NodeRecord], model: ModelKey, wanted: Span) -> list[Span]:
    holes = uncovered((record.span for record in records), model.num_blocks)
    return [hole for hole in holes if hole.start < wanted.end and wanted.start < hole.end]


def _furthest(
    records: Sequence[NodeRecord], block: int, choose: Callable[[Sequence[NodeRecord]], NodeRecord]
) -> NodeRecord | None:
    holders = [r for r in records if r.start_block <= block < r.end_block]
    if not holders:
        return None
    end = max(r.end_block for r in holders)
    return choose([r for r in holders if r.end_block == end])
