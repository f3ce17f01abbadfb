"""What the swarm looks like now: read in the background, so that a session is opened from memory."""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from swarm_client.routing.find_route import Hop, ModelKey
from swarm_client.routing.link_health import LinkHealth
from swarm_client.routing.peer_health import PeerHealth
from swarm_client.routing.prefix_holders import PrefixHolders
from swarm_client.routing.swarm_view import SwarmKnowledge, SwarmView
from swarm_protocol.errors import (
    CacheFullError,
    InvalidRecordError,
    LimitExceededError,
    MissingBlocksError,
    NodeDrainingError,
    RevisionMismatchError,
    StepTimeoutError,
    SwarmError,
)
from swarm_protocol.identity import verify
from swarm_protocol.ids import PeerId, parse_peer_id, short_peer
from swarm_protocol.ping import measure_ping
from swarm_protocol.records import NodeRecord, directory_keys, newest_records, unseal
from swarm_protocol.transport.base import Transport

logger = logging.getLogger(__name__)

LOOKUP_S = 20.0
"""For one look into the directory: some rounds of calls to peers, of which each may take seconds to be given up."""

IDLE_S = 120.0
"""Without a question, until nothing is read any more; the next question is then answered as the first one is."""

LOOK_PAUSE_S = 1.0
"""Between two looks while a session waits for a node."""

FEW_TOKENS = 4
"""Rows times columns of a step that take hardly longer than one, so that their time says how fast a node is."""

MAX_PINGS = 16
"""Nodes that are pinged after each look: all of a small swarm; of a large one the nearest and some by chance."""


class SwarmWatcher:
    """The nodes of one model, and which peers failed lately. Belongs to the event loop of `transport`."""

    def __init__(self, transport: Transport, model: ModelKey, period_s: float, health: PeerHealth) -> None:
        """Read every `period_s` while anybody asks, with 0 whenever somebody does. Watchers may share `health`."""
        self.holders = PrefixHolders()
        self.links = LinkHealth()
        self._transport = transport
        self._model = model
        self._keys = directory_keys(model.name, model.num_blocks)
        self._period_s = period_s
        self._health = health
        self._known = SwarmKnowledge()
        self._rng = random.Random()  # noqa: S311  # which nodes are pinged is no secret
        self._is_read = False
        self._asked_s = 0.0
        self._read_s = 0.0
        self._reading: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.Task[None] | None = None
        self._pinging: asyncio.Task[None] | None = None

    async def view(self) -> SwarmView:
        """Return the last view; only where there is none yet, or none is kept, it is read now.

        Raises StepTimeoutError if the directory does not answer then.
        """
        self._asked_s = self._transport.now_s()
        is_kept = self._loop is not None and not self._loop.done()
        if self._period_s > 0 and not is_kept:
            self._loop = self._start(self._keep(), "swarm watcher")
        if not (is_kept and self._is_read):
            await self.refresh()
        return self._known.view(self._transport.now_s())

    async def find(self, find: Callable[[SwarmView], list[Hop]], *, is_retry: bool = False) -> list[Hop]:
        """Return the route that `find` finds in the last view, or in a new one if it finds none; a retry begins there.

        Raises StepTimeoutError, and what `find` raises in a new view.
        """
        view = await (self._fresh_view() if is_retry else self.view())
        with contextlib.suppress(MissingBlocksError, RevisionMismatchError):
            return find(view)
        return find(await self._fresh_view())

    async def refresh(self) -> None:
        """Read the directory now, or wait for the look that is under way; if that fails the last view stays.

        Raises StepTimeoutError if it fails and there is no view.
        """
        if self._reading is None or self._reading.done():
            self._reading = self._start(self._read(), "swarm lookup")
        await asyncio.shield(self._reading)
        if not self._is_read:
            raise StepTimeoutError(f"the directory of {self._model.name} took longer than {LOOKUP_S:g} s")

    def look_soon(self) -> None:
        """Read the directory in the background if that was not done a moment ago: somebody waits for a node."""
        is_due = self._transport.now_s() - self._read_s >= LOOK_PAUSE_S
        if is_due and (self._reading is None or self._reading.done()):
            self._reading = self._start(self._read(), "swarm lookup")

    @property
    def avoided(self) -> frozenset[PeerId]:
        """The peers that failed lately and have not proven alive since, and those that are full."""
        return self._health.avoided(self._transport.now_s())

    @property
    def failing(self) -> frozenset[PeerId]:
        """Those of them that failed, rather than had no room."""
        return self._health.failing(self._transport.now_s())

    def failed(self, peer_id: PeerId, error: SwarmError | None = None) -> None:
        """A session met `error` at a node: choose others until it proves alive, or says that it has room again."""
        now_s = self._transport.now_s()
        self.holders.forget(peer_id)
        if isinstance(error, (CacheFullError, LimitExceededError, NodeDrainingError)):
            self._health.refused(peer_id, now_s)
        else:
            self._health.failed(peer_id, self._known.incarnation(peer_id), now_s)

    def stepped(self, hop: Hop, num_tokens: int, step_s: float) -> None:
        """A step of `num_tokens` tokens, rows times columns, came back from `hop` after `step_s`."""
        self._health.worked(hop.peer_id)
        if 0 < num_tokens <= FEW_TOKENS:
            self._known.stepped(hop.peer_id, len(hop.span), step_s, self._transport.now_s())

    async def close(self) -> None:
        """End what goes on in the background. Idempotent."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _fresh_view(self) -> SwarmView:
        await self.refresh()
        return self._known.view(self._transport.now_s())

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> "asyncio.Task[None]":
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _keep(self) -> None:
        """Read again and again until nobody has asked for a while."""
        while self._transport.now_s() - self._asked_s < IDLE_S:
            await asyncio.sleep(self._period_s)
            with contextlib.suppress(StepTimeoutError):
                await self.refresh()
        logger.debug("nobody asked for %g s: %s is not watched any more", IDLE_S, self._model.name)

    async def _read(self) -> None:
        self._read_s = self._transport.now_s()
        try:
            async with asyncio.timeout(LOOKUP_S):
                found = await self._transport.directory.lookup(self._keys)
        except Exception as error:  # a directory passes on whatever happened below it; the next look may go well
            logger.warning("the directory of %s could not be read: %r", self._model.name, error)
            return
        now_s = self._transport.now_s()
        records: list[NodeRecord] = []
        for values in found.values():
            for subkey, value in values.items():
                try:
                    record = unseal(value, parse_peer_id(subkey), verify, now_s)
                except (InvalidRecordError, ValueError) as error:
                    logger.debug("ignored a record: %s", error)
                    continue
                if record.model == self._model.name:
                    records.append(record)
        self._take(newest_records(records), now_s)

    def _take(self, records: Sequence[NodeRecord], now_s: float) -> None:
        self._known.read(records, now_s)
        records = self._known.records
        self._health.read(records, now_s)
        self._is_read = True
        logger.debug(
            "%d nodes of %s: %s", len(records), self._model.name, [short_peer(PeerId(r.peer_id)) for r in records]
        )
        if self._pinging is None or self._pinging.done():
            self._pinging = self._start(self._ping_some(), "swarm pings")

    async def _ping_some(self) -> None:
        now_s = self._transport.now_s()
        suspects = self._health.due_pings(now_s)[: MAX_PINGS // 2]
        passed_over = self._health.avoided(now_s)
        others = self._known.due_pings(MAX_PINGS - len(suspects), passed_over, now_s, self._rng.shuffle)
        await asyncio.gather(*(self._ping(peer_id, now_s) for peer_id in (*suspects, *others)))

    async def _ping(self, peer_id: PeerId, now_s: float) -> None:
        try:
            ping_s = await measure_ping(self._transport, peer_id)
        except SwarmError as error:
            logger.debug("no ping: %s peer=%s", error, short_peer(peer_id))
            self._known.unreachable(peer_id)
            self._health.failed(peer_id, self._known.incarnation(peer_id), self._transport.now_s())
        else:
            self._known.pinged(peer_id, ping_s, self._transport.now_s())
            self._health.answered(peer_id, now_s)
