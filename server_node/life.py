"""A node's life: open the model, join the swarm, choose blocks, serve them, move to others or pause, leave.

From one choice of blocks to the next is a stay: they are loaded, others try the node out, it serves, and it drains.
"""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Protocol

from server_node.admission import ServedSpan
from server_node.announcer import Announcer
from server_node.benchmark import figures_of_this_machine, measure_speed
from server_node.capacity import cache_tokens_to_reserve, gb, num_blocks_to_hold, prefix_tokens_to_keep
from server_node.compute.opened_model import OpenedModel
from server_node.compute.worker import ComputeWorker
from server_node.config import NodeConfig
from server_node.mover import Mover
from server_node.node import (
    LEAVING,
    Ending,
    Node,
    Observer,
    Online,
    OpenNetwork,
    announced,
    best_address,
    joined,
    no_wish,
    open_hivemind,
    outside_peer,
)
from server_node.placement import Joiner, choose_span
from server_node.probing import OutsidePeer, Proof
from server_node.status import ServedWork
from server_node.swarm_holders import holders_among
from server_node.swarm_records import read_records
from server_node.uplink import Uplink
from server_node.version import software
from server_node.waiting import comes_first, stopped_or_lost
from swarm_protocol.errors import PeerUnreachableError, SwarmError
from swarm_protocol.identity import Identity
from swarm_protocol.ids import peer_in
from swarm_protocol.messages import PROTOCOL_VERSIONS
from swarm_protocol.model.checkpoint import Progress
from swarm_protocol.model.hub import cache_folder
from swarm_protocol.records import NodeRecord, Placed
from swarm_protocol.spans import Span, describe_blocks, uncovered
from swarm_protocol.tensors import dtype_name
from swarm_protocol.transport.base import Transport
from swarm_protocol.transport.reachability import UNREACHABLE, reached_in_words

logger = logging.getLogger(__name__)

_CHOOSE_AGAIN_S = 60.0


class Owner(Protocol):
    """Tells whether the owner's own programs use the device."""

    async def until_away(self) -> None:
        """Wait until they do not."""

    async def until_there(self) -> None:
        """Wait until they do."""


WatchOwner = Callable[[str], Owner]


_LOOKUP_TIMEOUT_S = 30.0
"""To read who serves what: some lookups of a few round trips each."""


def watch_owner_of(devices: str) -> Owner:
    """Watch who uses these devices. Raises ConfigError where that cannot be told."""
    # Not at the top: hardly anybody asks for it, and it needs what a node without a GPU does not have.
    from server_node.owner_watch import watch_devices

    return watch_devices(devices)


async def run_node(
    config: NodeConfig,
    stop: asyncio.Event,
    observer: Observer,
    open_network: OpenNetwork = open_hivemind,
    watch_owner: WatchOwner = watch_owner_of,
) -> None:
    """Run a node until `stop` is set, then drain it and leave. Cancelling it leaves without draining.

    Raises ConfigError, ModelError, RouteError or OSError if it cannot start.
    """
    choice, compute = config.model, config.compute
    owner = watch_owner(compute.device) if config.only_when_idle else None
    worker = ComputeWorker(num_threads=compute.threads, max_queued=config.limits.max_queued)
    try:
        model = await worker.open_model(
            choice,
            device=compute.device,
            dtype=compute.dtype,
            quantization=compute.quantization,
            on_download=_until_stopped(observer.on_download, stop),
        )
        num_blocks_to_hold(choice, model)  # refused before anybody is told
        async with joined(config.network, open_network) as (transport, identity):
            outside = partial(outside_peer, config.network, transport, open_network)
            await _Life(config, stop, observer, worker, model, transport, identity, outside, owner).live()
    finally:
        worker.close()


class _Life:
    """One node, from when it is on the network to when it has left."""

    def __init__(
        self,
        config: NodeConfig,
        stop: asyncio.Event,
        observer: Observer,
        worker: ComputeWorker,
        model: OpenedModel,
        transport: Transport,
        identity: Identity,
        outside: OutsidePeer,
        owner: Owner | None,
    ) -> None:
        self._config = config
        self._stop = stop
        self._observer = observer
        self._worker = worker
        self._model = model
        self._transport = transport
        self._identity = identity
        self._outside = outside
        self._work = ServedWork()
        self._owner = owner
        self._figures = figures_of_this_machine(config)

    async def live(self) -> None:
        """Serve, stay after stay, until stopped. Raises what stands in the way of the first stay, and of two in a row.

        Later, blocks that cannot be loaded are given up for those that were served before.
        """
        if not await self._owner_is_away():
            return
        span = await self._choose()
        announcer = Announcer(self._transport, self._identity.sign, self._record(span))
        async with announced(announcer):
            served: Span | None = None
            while True:
                try:
                    ending = await self._stay(span, announcer)
                except (SwarmError, OSError) as error:
                    if self._stop.is_set():
                        return
                    if served is None:
                        raise
                    logger.error("blocks %s could not be loaded: %s", span, error)
                    ending, span, served = Ending(served), served, None
                else:
                    served = span
                if ending == LEAVING or self._stop.is_set():
                    return
                self._model = await self._worker.unload(self._model, self._config.compute.device)
                if ending.next_span is None:
                    await announcer.announce("offline")
                    if not await self._owner_is_away():
                        return
                next_span = await self._choose_again(ending.next_span)
                if next_span is None:
                    return
                span = next_span
                await announcer.move_to(span)

    async def _stay(self, span: Span, announcer: Announcer) -> Ending:
        """Serve `span` until the node leaves, pauses or takes other blocks; the sessions have gone then."""
        observer, served = self._observer, await self._load(span)
        node = Node(
            self._transport, announcer, self._worker, served, self._config.limits, self._work, self._is_reachable
        )
        observer.on_loaded(self._transport, node)
        await measure_speed(self._worker, served, node.speed, self._figures)
        online = Online(served.model, span, best_address(self._transport.addresses))
        num_blocks = self._model.checkpoint.num_blocks
        initial_peers = [peer_in(address) for address in self._config.network.initial_peers]
        proof = Proof(self._transport, served, num_blocks, initial_peers, self._outside)
        is_online = asyncio.Event()
        measuring = asyncio.create_task(self._know_uplink(is_online, proof, node), name="uplink")

        def on_online() -> None:
            is_online.set()
            observer.on_online(online)

        try:
            return await node.serve(
                self._stop,
                on_online,
                observer.on_draining,
                proof.given,
                partial(self._wish, announcer),
            )
        finally:
            measuring.cancel()
            await asyncio.gather(measuring, return_exceptions=True)
            observer.on_unloaded()

    async def _know_uplink(self, is_online: asyncio.Event, proof: Proof, node: Node) -> None:
        await is_online.wait()
        config = self._config
        folder, bound = cache_folder(config.model.cache_dir), config.network.max_bytes_per_s
        uplink = Uplink(self._transport, folder, node.speed, bound)
        await uplink.know(proof.peers)

    def _is_reachable(self) -> bool:
        """Whether others can open a connection to this node, as far as is known; without relaying nobody finds out."""
        network = self._config.network
        reached = reached_in_words(self._transport.addresses, network.initial_peers)
        return not network.relay or reached != UNREACHABLE

    async def _wish(self, announcer: Announcer) -> Ending:
        """Return why the node should end its stay, once it should."""
        moving = self._moving(announcer) if self._placed != "by_owner" else no_wish()
        pausing = self._pausing() if self._owner is not None else no_wish()
        wishes = asyncio.ensure_future(moving), asyncio.ensure_future(pausing)
        await comes_first(*wishes)
        return next(wish.result() for wish in wishes if wish.done() and not wish.cancelled())

    async def _moving(self, announcer: Announcer) -> Ending:
        num_blocks = self._model.checkpoint.num_blocks
        mover = Mover(self._transport, announcer, self._identity.sign, num_blocks, self._on_disk)
        span = await mover.better_blocks()
        logger.info("moving to %s", describe_blocks(span))
        return Ending(span)

    async def _pausing(self) -> Ending:
        assert self._owner is not None
        await self._owner.until_there()
        logger.info("other programs use the device: pausing until they do not")
        return Ending()

    async def _owner_is_away(self) -> bool:
        """Wait until the owner does not use the device; False if the node was asked to stop meanwhile."""
        if self._owner is None:
            return True
        self._observer.on_waiting(True)
        try:
            return await comes_first(self._owner.until_away(), stopped_or_lost(self._stop, self._transport))
        finally:
            self._observer.on_waiting(False)

    async def _choose(self, wanted: Span | None = None) -> Span:
        """Return which blocks to take: `wanted` if it fits, else what the owner fixed, or what the swarm lacks most."""
        choice = self._config.model
        most = num_blocks_to_hold(choice, self._model)
        if choice.blocks is not None:
            return choice.blocks
        if wanted is not None and len(wanted) <= most:
            return wanted
        checkpoint = self._model.checkpoint
        try:
            async with asyncio.timeout(_LOOKUP_TIMEOUT_S):
                records = await read_records(self._transport, checkpoint.name, checkpoint.num_blocks)
        except TimeoutError:
            raise PeerUnreachableError(f"the directory did not answer within {_LOOKUP_TIMEOUT_S:g} s") from None
        others = [
            record
            for record in records
            if record.peer_id != self._transport.peer_id and record.revision == checkpoint.revision
        ]
        least = 1 if choice.num_blocks is None else most
        joiner = Joiner(most, min_blocks=least, on_disk=self._on_disk)
        holders = holders_among(others)
        span = choose_span(checkpoint.num_blocks, joiner, holders)
        missing = uncovered((holder.span for holder in holders), checkpoint.num_blocks)
        why = f"nobody has {', '.join(map(describe_blocks, missing))} yet" if missing else "every block is there"
        logger.info("other nodes: %d; %s: taking %s", len(holders), why, describe_blocks(span))
        return span

    async def _choose_again(self, wanted: Span | None) -> Span | None:
        """The same, as often as it takes; None if the node was asked to stop meanwhile."""
        while True:
            try:
                return await self._choose(wanted)
            except (SwarmError, OSError) as error:  # memory that others took, or a network that is away for now
                logger.warning("no blocks can be taken now, trying again in %g s: %s", _CHOOSE_AGAIN_S, error)
            if not await comes_first(asyncio.sleep(_CHOOSE_AGAIN_S), stopped_or_lost(self._stop, self._transport)):
                return None
            self._model = await self._worker.unload(self._model, self._config.compute.device)

    @property
    def _on_disk(self) -> tuple[Span, ...]:
        """Blocks that need no download where others do."""
        return () if self._model.disk is None else self._model.disk.spans

    @property
    def _placed(self) -> Placed:
        choice = self._config.model
        if choice.blocks is not None:
            return "by_owner"
        return "freely" if choice.num_blocks is None else "by_length"

    async def _load(self, span: Span) -> ServedSpan:
        compute, model = self._config.compute, self._model
        progress = _until_stopped(self._observer.on_loading, self._stop)
        loaded = await self._worker.load(model, span, compute.device, progress)
        cache_tokens = cache_tokens_to_reserve(compute.cache_tokens, loaded)
        cache_bytes = cache_tokens * loaded.kv_bytes_per_token
        logger.info("KV cache for %d tokens, %s of %s free", cache_tokens, gb(cache_bytes), gb(loaded.free_bytes))
        prefix_tokens = prefix_tokens_to_keep(compute.prefix_tokens, cache_tokens, loaded)
        self._worker.keep_prefixes(prefix_tokens * loaded.kv_bytes_per_token)
        return ServedSpan(
            model=model.checkpoint.name,
            revision=model.checkpoint.revision,
            span=span,
            hidden_size=loaded.hidden_size,
            dtype=loaded.dtype,
            cache_tokens=cache_tokens,
            numerics=model.numerics,
        )

    def _record(self, span: Span) -> NodeRecord:
        now_s, model = self._transport.now_s(), self._model
        return NodeRecord(
            peer_id=self._transport.peer_id,
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
            dtype=dtype_name(model.dtype),
            numerics=model.numerics,
            free_tokens=0,
            max_tokens=0,
            name=self._config.name,
            max_blocks=num_blocks_to_hold(self._config.model, model),
            placed=self._placed,
        )


def _until_stopped(progress: Progress, stop: asyncio.Event) -> Progress:
    def report(num_done: int, num_all: int) -> None:
        # The device thread cannot be cancelled; between two pieces it can be told that nobody waits any more.
        if stop.is_set():
            raise InterruptedError("stopped while loading")
        progress(num_done, num_all)

    return report
