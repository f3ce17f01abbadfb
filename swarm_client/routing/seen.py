"""Pure: what a client's view of a model's nodes shows to people."""

from collections.abc import Collection, Mapping, Sequence

from swarm_client.model_swarm import ModelSwarm, SeenNode
from swarm_client.routing.costs import CostModel, RouteWish, Way
from swarm_client.routing.find_route import ModelKey, find_route
from swarm_client.routing.swarm_view import SwarmView
from swarm_protocol.errors import SwarmError
from swarm_protocol.ids import PeerId
from swarm_protocol.records import NodeRecord


def seen_swarm(
    view: SwarmView, model: ModelKey, avoided: Collection[PeerId], failing: Collection[PeerId], now_s: float
) -> ModelSwarm:
    """Return what `view` shows at `now_s`. `avoided` are not asked now, of which `failing` did not answer.

    Records that expired since the view was read are left out. A failing node whose round trip is known answered a ping
    since, or only a session of this client broke off: it may well serve others.
    """
    records = [record for record in view.records if record.expires_at_s > now_s]
    nodes = [_seen(record, view.pings_s, failing) for record in records]
    reachable = [node.record for node in nodes if not node.is_unreachable]
    token_s = _token_s(SwarmView(reachable, view.pings_s, view.own), model, avoided)
    return ModelSwarm(model.name, model.revision, model.num_blocks, now_s, tuple(nodes), token_s)


def _seen(record: NodeRecord, pings_s: Mapping[PeerId, float], failing: Collection[PeerId]) -> SeenNode:
    peer_id = PeerId(record.peer_id)
    ping_s = pings_s.get(peer_id)
    return SeenNode(record, ping_s, peer_id in failing and ping_s is None)


def _token_s(view: SwarmView, model: ModelKey, avoided: Collection[PeerId]) -> float | None:
    wish = RouteWish(avoided=avoided, way=Way.RING)
    try:
        hops = find_route(view, model, wish, _first)
    except SwarmError:
        return None
    records = {record.peer_id: record for record in view.records}
    return CostModel(view, wish).route_s([(records[hop.peer_id], hop.span) for hop in hops])


def _first(options: Sequence[int]) -> int:
    return options[0]
