"""A node's life: open the model, join the swarm, choose blocks, load them, serve, drain, leave."""

import asyncio
import importlib.metadata
import logging
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from server_node.admission import Admission, ServedSpan
from server_node.announcer import Announcer
from server_node.benchmark import measure_speed
from server_node.capacity import cache_tokens_to_reserve, gb, num_blocks_to_hold, prefix_tokens_to_keep
from server_node.compute.opened_model import OpenedModel
from server_node.compute.worker import ComputeWorker
from server_node.config import NodeConfig, NodeLimits
from server_node.draining import drain_sessions
from server_node.handlers import NodeHandlers
from server_node.neighbours import NeighbourPings
from server_node.placement import Holder, Joiner, choose_span
from server_node.probing import Prober, Proof, Prove, is_proven, needs_no_proof
from server_node.sessions import SessionTable
from server_node.speed import RoutingFacts, SpeedMeter
from server_node.transfers import Transfers
from swarm_protocol.errors import ConfigError, InvalidRecordError, PeerUnreachableError, StreamLostError
from swarm_protocol.identity import Identity, load_or_create_identity, verify
from swarm_protocol.ids import PeerId, peer_in, short_peer
from swarm_protocol.messages import (
    COMPUTE_PROTOCOL,
    PROBE_PROTOCOL,
    PROTOCOL_VERSIONS,
    RING_PROTOCOL,
    SESSION_PROTOCOL,
    TRANSFER_PROTOCOL,
)
from swarm_protocol.model.checkpoint import Progress
from swarm_protocol.records import NodeRecord, directory_keys, unseal
from swarm_protocol.spans import Span
from swarm_protocol.tensors import dtype_name
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

    `on_loading` counts blocks, `on_download` bytes. `on_loaded` comes once, before others try the node out, then
    `on_online` once, and `on_draining` with the number of sessions that are still here while the node leaves.
    """

    on_loading: Progress
    on_online: Callable[[Online], None]
    on_draining: Callable[[int], None] = lambda _: None
    on_loaded: Callable[[Transport, "Node"], None] = lambda *_: None
    on_download: Progress = lambda num_done, num_all: None


async def open_hivemind(config: NetworkConfig) -> Transport:
    """Join the real network."""
    # Not at the top: it takes seconds, and a node on another network needs none of it.
    from swarm_protocol.transport.hivemind_net import open_transport

    return await open_transport(config)


async def run_node(
    config: NodeConfig, stop: asyncio.Event, observer: Observer, open_network: OpenNetwork = open_hivemind
) -> None:
    """Run a node until `stop` is set, then drain it and leave. Cancelling it leaves without draining.

    Raises ConfigError, ModelError, RouteError or OSError if it cannot start.
    """
    choice, compute = config.model, config.compute
    worker = ComputeWorker(num_threads=compute.threads, max_queued=config.limits.max_queued)
    try:
        model = await worker.open_model(
            choice,
            device=compute.device,
            dtype=compute.dtype,
            quantization=compute.quantization,
            on_download=_until_stopped(observer.on_download, stop),
        )
        num_blocks = num_blocks_to_hold(choice, model)
        async with joined(config.network, open_network) as (transport, identity):
            others = [Holder("", held) for held in await held_spans(transport, model)]
            joiner = Joiner(num_blocks, min_blocks=num_blocks)
            span = choice.blocks or choose_span(model.checkpoint.num_blocks, joiner, others)
            announcer = Announcer(transport, identity.sign, _record(transport, model, span, config.name))
            async with announced(announcer):
                served = await _load(config, worker, model, span, _until_stopped(observer.on_loading, stop))
                online = Online(served.model, span, best_address(transport.addresses))
                node = Node(transport, announcer, worker, served, config.limits)
                observer.on_loaded(transport, node)
                await measure_speed(worker, served, node.speed)
                outside = partial(_outside_peer, config.network, transport, open_network)
                initial_peers = [peer_in(address) for address in config.network.initial_peers]
                proof = Proof(transport, served, model.checkpoint.num_blocks, initial_peers, outside)
                await node.serve(stop, lambda: observer.on_online(online), observer.on_draining, proof.given)
    finally:
        worker.close()


class Node:
    """A loaded span on the network."""

    def __init__(
        self,
        transport: Transport,
        announcer: Announcer,
        worker: ComputeWorker,
        served: ServedSpan,
        limits: NodeLimits,
    ) -> None:
        self.admission = Admission(served, limits)
        self.sessions = SessionTable(self.admission, transport)
        self.speed = SpeedMeter()
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
    ) -> None:
        """Serve sessions and forward passes until `stop` is set and the sessions have moved, or their time is over.

        The record says that the node is online once `prove` has returned.
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
            if await is_proven(prove(), stopped_or_lost(stop, self._transport)):
                await self._announcer.announce("online")
                on_online()
            pinging = group.create_task(self._neighbours.run(), name="neighbour pings")
            await stopped_or_lost(stop, self._transport)
            pinging.cancel()
            ends_s = asyncio.get_running_loop().time() + self._limits.drain_s
            await drain_sessions(
                self.admission,
                self.sessions,
                self._limits.drain_s,
                lambda: self._announcer.announce("draining"),
                on_draining,
            )
            await handlers.drain(max(_LAST_STEPS_S, ends_s - asyncio.get_running_loop().time()))

    def _routing_facts(self) -> RoutingFacts:
        return self.speed.facts(self._neighbours.pings_s, asyncio.get_running_loop().time())


async def stopped_or_lost(stop: asyncio.Event, transport: Transport) -> None:
    """Wait until `stop` is set. Raises StreamLostError if the network is lost for good before."""
    lost = asyncio.create_task(transport.until_lost(), name="network-watch")
    stopped = asyncio.create_task(stop.wait(), name="stop-watch")
    try:
        await asyncio.wait([lost, stopped], return_when=asyncio.FIRST_COMPLETED)
    finally:
        lost.cancel()
        stopped.cancel()
    if not stop.is_set():
        raise StreamLostError("the network daemon ended; start the node again")


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
            yield transport, identity
        finally:
            await transport.close()


@asynccontextmanager
async def _outside_peer(
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


async def held_spans(transport: Transport, model: OpenedModel) -> list[Span]:
    """Return the spans that other nodes of the model hold or are about to hold. Raises PeerUnreachableError."""
    keys = directory_keys(model.checkpoint.name, model.checkpoint.num_blocks)
    try:
        async with asyncio.timeout(_LOOKUP_TIMEOUT_S):
            found = await transport.directory.lookup(keys)
    except TimeoutError:
        raise PeerUnreachableError(f"the directory did not answer within {_LOOKUP_TIMEOUT_S:g} s") from None
    held = []
    for owner, value in ((owner, value) for values in found.values() for owner, value in values.items()):
        try:
            record = unseal(value, PeerId(owner), verify, transport.now_s())
        except InvalidRecordError as error:
            logger.debug("record passed over: %s peer=%s", error, short_peer(PeerId(owner)))
            continue
        is_other = owner != transport.peer_id and record.revision == model.checkpoint.revision
        if is_other and record.state in ("joining", "online"):
            held.append(record.span)
    return held


def best_address(addresses: Sequence[str]) -> str:
    """Return the address to show to others: one that works beyond this machine, where there is one."""
    if not addresses:
        raise ConfigError("the network gave this node no address to be reached at: check --host")
    beyond = [address for address in addresses if not address.startswith(("/ip4/127.", "/ip6/::1/"))]
    return (beyond or list(addresses))[0]


async def _load(
    config: NodeConfig, worker: ComputeWorker, model: OpenedModel, span: Span, progress: Progress
) -> ServedSpan:
    loaded = await worker.load(model, span, config.compute.device, progress)
    cache_tokens = cache_tokens_to_reserve(config.compute.cache_tokens, loaded)
    cache_bytes = cache_tokens * loaded.kv_bytes_per_token
    logger.info("KV cache for %d tokens, %s of %s free", cache_tokens, gb(cache_bytes), gb(loaded.free_bytes))
    prefix_tokens = prefix_tokens_to_keep(config.compute.prefix_tokens, cache_tokens, loaded)
    worker.keep_prefixes(prefix_tokens * loaded.kv_bytes_per_token)
    return ServedSpan(
        model=model.checkpoint.name,
        revision=model.checkpoint.revision,
        span=span,
        hidden_size=loaded.hidden_size,
        dtype=loaded.dtype,
        cache_tokens=cache_tokens,
        numerics=_numerics(model),
    )


def _numerics(model: OpenedModel) -> str:
    return f"{model.checkpoint.revision}/{dtype_name(model.dtype)}/{model.kernels}"


def _record(transport: Transport, model: OpenedModel, span: Span, name: str) -> NodeRecord:
    now_s = transport.now_s()
    dtype = dtype_name(model.dtype)
    return NodeRecord(
        peer_id=transport.peer_id,
        model=model.checkpoint.name,
        revision=model.checkpoint.revision,
        start_block=span.start,
        end_block=span.end,
        state="joining",
        incarnation=int(now_s * 1000),
        published_s=now_s,
        expires_at_s=now_s,
        versions=PROTOCOL_VERSIONS,
        software=software(),
        dtype=dtype,
        numerics=_numerics(model),
        free_tokens=0,
        max_tokens=0,
        name=name,
    )


def software() -> str:
    """Return the program and its version, as records name it."""
    try:
        return f"umbel {importlib.metadata.version('umbel')}"
    except importlib.metadata.PackageNotFoundError:
        return "umbel from source"


def _until_stopped(progress: Progress, stop: asyncio.Event) -> Progress:
    def report(num_done: int, num_all: int) -> None:
        # The device thread cannot be cancelled; between two pieces it can be told that nobody waits any more.
        if stop.is_set():
            raise InterruptedError("stopped while loading")
        progress(num_done, num_all)

    return report
