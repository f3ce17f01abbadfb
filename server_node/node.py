"""A node that serves its blocks, and what it needs of the network around it. `life.py` says how it comes to them."""

import asyncio
import logging
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from server_node.admission import Admission, ServedSpan
from server_node.announcer import Announcer
from server_node.compute.worker import ComputeWorker
from server_node.config import NodeLimits
from server_node.draining import drain_sessions
from server_node.handlers import NodeHandlers
from server_node.neighbours import NeighbourPings
from server_node.paced_transport import paced
from server_node.probing import Prober, Prove, needs_no_proof
from server_node.sessions import SessionTable
from server_node.speed import RoutingFacts, SpeedMeter
from server_node.status import ServedWork
from server_node.transfers import Transfers
from server_node.waiting import comes_first, stopped_or_lost
from swarm_protocol.errors import ConfigError
from swarm_protocol.identity import Identity, load_or_create_identity
from swarm_protocol.ids import short_peer
from swarm_protocol.messages import (
    COMPUTE_PROTOCOL,
    PROBE_PROTOCOL,
    RING_PROTOCOL,
    SESSION_PROTOCOL,
    TRANSFER_PROTOCOL,
)
from swarm_protocol.model.checkpoint import Progress
from swarm_protocol.records import REFRESH_PERIOD_S
from swarm_protocol.spans import Span
from swarm_protocol.transport.base import Transport
from swarm_protocol.transport.network_config import NetworkConfig

logger = logging.getLogger(__name__)

OpenNetwork = Callable[[NetworkConfig], Awaitable[Transport]]

_LOOKUP_TIMEOUT_S = 30.0
"""To read who serves what: some lookups of a few round trips each."""

_LAST_STEPS_S = 5.0
"""For steps that run when the time of the open sessions is over."""


@dataclass(frozen=True, slots=True)
class Online:
    """What a node that serves tells its owner; `address` is a multiaddress to reach it at."""

    model: str
    span: Span
    address: str


@dataclass(frozen=True, slots=True)
class Observer:
    """Whom a node tells how it gets on: `on_loading` and `on_download` on the device thread, the others on the loop.

    `on_loading` counts blocks, `on_download` bytes. `on_loaded` comes before others try the node out, then `on_online`,
    and `on_draining` with the number of sessions that are still here while the node gives its blocks up, then
    `on_unloaded`; all that again for each span that it takes. `on_waiting` says when it begins and ends to wait for
    its owner's programs to leave the device alone.
    """

    on_loading: Progress
    on_online: Callable[[Online], None]
    on_draining: Callable[[int], None] = lambda _: None
    on_loaded: Callable[[Transport, "Node"], None] = lambda *_: None
    on_download: Progress = lambda num_done, num_all: None
    on_unloaded: Callable[[], None] = lambda: None
    on_waiting: Callable[[bool], None] = lambda is_waiting: None


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a node stops serving its blocks: to take `next_span`; without one, to pause, or to leave for good."""

    next_span: Span | None = None
    is_for_good: bool = False


LEAVING = Ending(is_for_good=True)

Wish = Callable[[], Awaitable[Ending]]
"""Returns once the node should stop serving its blocks although nobody stopped it."""


async def no_wish() -> Ending:
    """Never."""
    await asyncio.Event().wait()
    return LEAVING


async def open_hivemind(config: NetworkConfig) -> Transport:
    """Join the real network."""
    # Not at the top: it takes seconds, and a node on another network needs none of it.
    from swarm_protocol.transport.hivemind_net import open_transport

    return await open_transport(config)


class Node:
    """A loaded span on the network."""

    def __init__(
        self,
        transport: Transport,
        announcer: Announcer,
        worker: ComputeWorker,
        served: ServedSpan,
        limits: NodeLimits,
        work: ServedWork | None = None,
        is_reachable: Callable[[], bool] = lambda: True,
    ) -> None:
        """`work` goes on counting where an earlier stay has ended.

        While not `is_reachable`, the record of a node that is online says that it is joining.
        """
        self.is_reachable = is_reachable
        self.admission = Admission(served, limits)
        self.sessions = SessionTable(self.admission, transport)
        self.speed = SpeedMeter(work)
        self._neighbours = NeighbourPings(transport, served)
        self._transport = transport
        self._announcer = announcer
        self._worker = worker
        self._limits = limits

    async def serve(
        self,
        stop: asyncio.Event,
        on_online: Callable[[], None],
        on_draining: Callable[[int], None] = lambda _: None,
        prove: Prove = needs_no_proof,
        wish: Wish = no_wish,
    ) -> Ending:
        """Serve sessions and forward passes until they have to move, and have moved, or their time is over.

        They have to when `stop` is set, or `wish` returns. The record says that the node is online once `prove` has
        returned; `wish` is not asked before.
        Raises StreamLostError, in a group, if the network is lost for good: a node that nobody reaches must not look
        alive.
        """
        async with asyncio.TaskGroup() as group:
            handlers = NodeHandlers(self.admission, self.sessions, self._worker, group, self.speed)
            await self._transport.serve(SESSION_PROTOCOL, handlers.serve_session)
            await self._transport.serve(RING_PROTOCOL, handlers.serve_ring)
            await self._transport.serve(COMPUTE_PROTOCOL, handlers.serve_compute)
            transfers = Transfers(self._transport, self.admission, self.sessions, self._worker)
            await self._transport.serve(
                TRANSFER_PROTOCOL, lambda stream: handlers.serve_with(stream, transfers.converse)
            )
            await self._transport.serve(PROBE_PROTOCOL, Prober(self._transport).serve)
            cache_tokens = self.admission.served.cache_tokens
            self._announcer.serving(cache_tokens, lambda: self.admission.tokens_for_new_sessions, self._routing_facts)
            if await comes_first(prove(), stopped_or_lost(stop, self._transport)):
                await self._announcer.announce("online")
                on_online()
            pinging = group.create_task(self._neighbours.run(), name="neighbour pings")
            telling = group.create_task(self._tell_whether_reachable(), name="reachability")
            ending = await self._ending(stop, wish)
            pinging.cancel()
            telling.cancel()
            ends_s = asyncio.get_running_loop().time() + self._limits.drain_s
            await drain_sessions(
                self.admission,
                self.sessions,
                self._limits.drain_s,
                lambda: self._announcer.announce("draining", ending.next_span),
                on_draining,
            )
            await handlers.drain(max(_LAST_STEPS_S, ends_s - asyncio.get_running_loop().time()))
        return ending

    async def _ending(self, stop: asyncio.Event, wish: Wish) -> Ending:
        if stop.is_set():
            return LEAVING
        wishing = asyncio.ensure_future(wish())
        return wishing.result() if await comes_first(wishing, stopped_or_lost(stop, self._transport)) else LEAVING

    async def _tell_whether_reachable(self) -> None:
        """Keep clients away while they cannot get here: who tried this node out came by a way that it had opened."""
        while True:
            await asyncio.sleep(REFRESH_PERIOD_S)
            is_reachable = self.is_reachable()
            if is_reachable != (self._announcer.state == "online"):
                text = "others reach this node again" if is_reachable else "others cannot reach this node any more"
                logger.warning("%s peer=%s", text, short_peer(self._transport.peer_id))
                await self._announcer.announce("online" if is_reachable else "joining")

    def _routing_facts(self) -> RoutingFacts:
        return self.speed.facts(self._neighbours.pings_s, asyncio.get_running_loop().time())


@asynccontextmanager
async def announced(announcer: Announcer) -> AsyncIterator[None]:
    """Keep the node's record fresh inside, from JOINING on; take it back on the way out."""
    await announcer.announce("joining")
    refreshing = asyncio.create_task(announcer.run(), name="announcer")
    try:
        yield
    finally:
        refreshing.cancel()
        await asyncio.gather(refreshing, return_exceptions=True)
        await announcer.announce("offline")


@asynccontextmanager
async def joined(
    network: NetworkConfig, open_network: OpenNetwork = open_hivemind
) -> AsyncIterator[tuple[Transport, Identity]]:
    """Be on the network inside, under the identity of `network`, or one that is gone at the end.

    Raises ConfigError for unusable addresses, ports and key files, PeerUnreachableError if no initial peer answers.
    """
    with tempfile.TemporaryDirectory(prefix="umbel-") as folder:
        path = network.identity_path or str(Path(folder, "identity"))
        identity = load_or_create_identity(Path(path))
        transport = await open_network(replace(network, identity_path=path))
        try:
            _remove_all_in(Path(folder))  # the network has read the key; a process that is killed leaves none behind
            yield paced(transport, network.max_bytes_per_s), identity
        finally:
            await transport.close()


@asynccontextmanager
async def outside_peer(
    network: NetworkConfig, transport: Transport, open_network: OpenNetwork
) -> AsyncIterator[Transport]:
    """Be on the network inside as another peer, which only knows `transport`."""
    local = [address for address in transport.addresses if address.startswith(("/ip4/127.", "/ip6/::1/"))]
    config = NetworkConfig(tuple((local or list(transport.addresses))[:1]), network.host, client_mode=True)
    async with joined(config, open_network) as (outside, _):
        yield outside


def _remove_all_in(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def best_address(addresses: Sequence[str]) -> str:
    """Return the address to show to others: one that works beyond this machine, where there is one."""
    if not addresses:
        raise ConfigError("the network gave this node no address to be reached at: check --host")
    beyond = [address for address in addresses if not address.startswith(("/ip4/127.", "/ip6/::1/"))]
    return (beyond or list(addresses))[0]
