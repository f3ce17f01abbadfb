"""Pure: what a token costs on its way through a route, in seconds.

    loop = out to the first node + Σ nodes (software + queue + Σ blocks) + between neighbours + back from the last node

A step that goes from the client to a node and back at every hop (`Way.RELAYED`) is the case in which each neighbour is
reached through the client, whatever nodes know of the ways between each other. On a ring (`Way.RING`) the way between
two nodes that nobody measured is taken to be that through the client, too: it is what a hop costs whose nodes cannot
dial each other, so what is reckoned can be had.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from swarm_client.routing.swarm_view import HOP_S, SwarmView
from swarm_protocol.ids import PeerId
from swarm_protocol.records import NodeRecord
from swarm_protocol.spans import Span

UNKNOWN_PING_S = 0.15
"""There and back to a node that was not measured: between continents, as the predecessor takes it."""

UNKNOWN_BLOCK_S = 0.02
"""Of a node that does not say how fast it is: a slow GPU for a block of a 70B model, so that it is no advantage."""

TOKENS_PER_STEP = 8
"""Prompt tokens that a node computes in the time of a decode step, where it does not say; GPUs do far more."""

ANSWER_STEPS = 128
"""Steps over which the prompt's computation counts: an answer of a chat. It turns seconds before the first token into
seconds per token."""

SLACK = 0.07
"""Routes that are so much longer than the best are as good: clients that see the same swarm should not all choose the
same nodes, and a queue of one step is soon more than that."""


class Way(Enum):
    """How a step travels."""

    RELAYED = "relayed"
    RING = "ring"


@dataclass(frozen=True, slots=True)
class RouteWish:
    """What a session wants of a route.

    needed_tokens   KV cache that must be free at every node
    avoided         peers that are asked only for blocks that nobody else serves
    blocked         peers that are never asked
    affinity        tokens of the session's prompt that a node need not compute, since it holds them
    way             how its steps will travel
    slack           how much longer than the best, at most, a route may be that is chosen by chance
    span            the blocks that it is for; None for all. A route through a part begins and ends at the client, too
    """

    needed_tokens: int = 0
    avoided: Collection[PeerId] = ()
    blocked: Collection[PeerId] = ()
    affinity: Mapping[PeerId, int] = field(default_factory=dict)
    way: Way = Way.RELAYED
    slack: float = SLACK
    span: Span | None = None


@dataclass(frozen=True, slots=True)
class NodeCost:
    """Seconds: one way between client and node, for a visit however short, and for each block run there."""

    one_way_s: float
    visit_s: float
    block_s: float


class CostModel:
    """The costs of one wish in one view."""

    def __init__(self, view: SwarmView, wish: RouteWish) -> None:
        self._view = view
        self._wish = wish
        self._prompt_tokens = max(wish.affinity.values(), default=0)

    def node(self, record: NodeRecord) -> NodeCost:
        """Return the costs of a node.

        What this client measured itself outweighs what the node says; once that is old, the worse of both counts. The
        prompt that has to be computed because this node does not hold it as another one does counts by its share.
        """
        peer_id = PeerId(record.peer_id)
        block_s, queue_s = _said_block_s(record), record.queue_s
        own = self._view.own.get(peer_id)
        if own is not None and own.is_recent:
            block_s, queue_s = own.block_s, 0.0
        elif own is not None:
            block_s = max(block_s, own.block_s)
        if self._prompt_tokens:
            missing = self._prompt_tokens - min(self._wish.affinity.get(peer_id, 0), self._prompt_tokens)
            block_s += missing * self.token_s(record) / ANSWER_STEPS
        return NodeCost(self._view.pings_s.get(peer_id, UNKNOWN_PING_S) / 2, HOP_S + queue_s, block_s)

    def token_s(self, record: NodeRecord) -> float:
        """Return the seconds per block and token of work on many tokens at once."""
        return _said_block_s(record) / TOKENS_PER_STEP if record.block_token_s is None else record.block_token_s

    def believed_pings_s(
        self,
        records: Sequence[NodeRecord],
        near: npt.NDArray[np.intp],
        far: npt.NDArray[np.intp],
        said_s: npt.NDArray[np.float64],
    ) -> npt.NDArray[np.float64]:
        """Return the pings between the records `near` and those `far`, of which the former say `said_s`.

        Two nodes are not nearer to each other than their distances from here differ, whatever one of them says.
        """
        own_s = np.array([self._view.pings_s.get(PeerId(record.peer_id), np.nan) for record in records])
        believed_s: npt.NDArray[np.float64] = np.fmax(said_s, np.abs(own_s[near] - own_s[far]))
        return believed_s

    def link_s(self, first: NodeRecord, second: NodeRecord) -> float:
        """Return the way from one node of a route to the next."""
        through_client_s = self.node(first).one_way_s + self.node(second).one_way_s
        said_s = [
            ping_s
            for record, other in ((first, second), (second, first))
            for peer_id, ping_s in record.pings_s
            if peer_id == other.peer_id
        ]
        if self._wish.way is Way.RELAYED or not said_s:
            return through_client_s
        near, far = np.zeros(len(said_s), dtype=np.intp), np.ones(len(said_s), dtype=np.intp)
        believed_s = self.believed_pings_s((first, second), near, far, np.array(said_s))
        return min(through_client_s, float(believed_s.min()) / 2)

    def route_s(self, route: Sequence[tuple[NodeRecord, Span]]) -> float:
        """Return the seconds of a whole loop through the nodes of `route`, each with the blocks that it runs."""
        total = 0.0
        for number, (record, span) in enumerate(route):
            cost = self.node(record)
            total += cost.visit_s + cost.block_s * len(span)
            total += self.link_s(route[number - 1][0], record) if number else cost.one_way_s
        return total + self.node(route[-1][0]).one_way_s


def _said_block_s(record: NodeRecord) -> float:
    return UNKNOWN_BLOCK_S if record.block_step_s is None else record.block_step_s
