"""Looks for better blocks while a node serves, and says when it may move to them.

The decisions are `placement_plan`'s and `move_turns`'s; here they meet the directory.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from server_node.announcer import Announcer
from server_node.move_turns import READ_AT_S, ROUND_S, may_claim, may_look, next_look_s, round_of, winner
from server_node.placement import Holder
from server_node.placement_plan import Plan, better_span, next_moves, plan_moves
from server_node.swarm_holders import holders_among, stays_online
from server_node.swarm_records import read_records
from swarm_protocol.identity import verify
from swarm_protocol.ids import PeerId, short_peer
from swarm_protocol.move_claims import MoveClaim, claims_among, claims_key, seal_claim
from swarm_protocol.records import NodeRecord
from swarm_protocol.spans import Span, describe_blocks, uncovered
from swarm_protocol.transport.base import Transport

logger = logging.getLogger(__name__)

_STORE_TIMEOUT_S = 8.0
_LOOKUP_TIMEOUT_S = 20.0

_PLAN_AGAIN_S = 600.0
"""Until a plan is made anew although nobody has come, gone or moved: speeds may have changed."""


@dataclass(frozen=True, slots=True)
class _Planned:
    """What was planned last, None for nothing, and for whom."""

    plan: Plan | None
    layout: frozenset[tuple[str, Span]]
    made_s: float


class Mover:
    """Finds better blocks for one stay of a node. Belongs to the event loop."""

    def __init__(
        self,
        transport: Transport,
        announcer: Announcer,
        sign: Callable[[bytes], bytes],
        num_blocks: int,
        on_disk: Sequence[Span] = (),
    ) -> None:
        """The node's blocks are those of the announcer's record, of a model of `num_blocks`."""
        self._transport = transport
        self._announcer = announcer
        self._sign = sign
        self._num_blocks = num_blocks
        self._on_disk = on_disk
        self._planned: _Planned | None = None

    async def better_blocks(self) -> Span:
        """Return blocks to move to: once there are some, and it is this node's turn."""
        arrived_s = self._transport.now_s()
        while True:
            await self._sleep_until(next_look_s(self._peer_id, self._transport.now_s()))
            number = round_of(self._transport.now_s())
            try:
                span = await self._look(number, arrived_s)
            except Exception as error:  # a directory passes on whatever happened below it; the next round may go well
                logger.warning("could not look for better blocks: %r", error)
                span = None
            if span is not None:
                return span
            await self._sleep_until((number + 1) * ROUND_S)

    async def _look(self, number: int, arrived_s: float) -> Span | None:
        """Take part in a round of claims; return the blocks to move to if it is won."""
        target = await self._target(await self._records(), arrived_s)
        if target is None:
            return None
        if not may_claim(number, self._transport.now_s()):
            logger.info("planned a move to %s too late for this round", target)
            return None
        logger.info("%s would serve the swarm better: claiming the next move", describe_blocks(target))
        claim = MoveClaim(
            self._peer_id, target.start, target.end, number, self._announcer.published.revision, (number + 2) * ROUND_S
        )
        await self._store(claim)
        await self._sleep_until(number * ROUND_S + READ_AT_S)
        first = winner(await self._claims(), number)
        if first is None or first.peer_id != self._peer_id:
            logger.info("peer=%s moves first", short_peer(PeerId(first.peer_id)) if first is not None else "nobody")
            return None
        return await self._still(target)

    async def _target(self, records: list[NodeRecord], arrived_s: float) -> Span | None:
        holders = holders_among(records)
        is_missing = bool(uncovered((holder.span for holder in holders), self._num_blocks))
        now_s = self._transport.now_s()
        if not may_look(arrived_s, self._peer_id, now_s, is_a_block_missing=is_missing):
            return None
        plan = await self._plan(holders)
        return None if plan is None else better_span(plan, self._peer_id, holders, self._on_disk)

    async def _plan(self, holders: list[Holder]) -> Plan | None:
        planned, now_s = self._planned, self._transport.now_s()
        layout = frozenset((holder.peer_id, holder.span) for holder in holders)
        if planned is not None and planned.plan is not None and next_moves(planned.plan, holders):
            return planned.plan
        if planned is None or planned.layout != layout or now_s > planned.made_s + _PLAN_AGAIN_S:
            # Some seconds for a thousand nodes.
            plan = await asyncio.to_thread(plan_moves, self._num_blocks, holders)
            self._planned = planned = _Planned(plan, layout, now_s)
        return planned.plan

    async def _still(self, target: Span) -> Span | None:
        """Return `target` unless somebody came, left or moved since it was claimed."""
        records = await self._records()
        plan = self._planned.plan if self._planned is not None else None
        mine = self._announcer.published.span
        if plan is None or better_span(plan, self._peer_id, holders_among(records), self._on_disk) != target:
            logger.info("the swarm has changed: staying for now")
            return None
        if not stays_online(mine, target, [record for record in records if record.peer_id != self._peer_id]):
            logger.info("others that hold %s are not online yet: staying for now", describe_blocks(mine))
            return None
        return target

    async def _records(self) -> list[NodeRecord]:
        mine = self._announcer.published
        async with asyncio.timeout(_LOOKUP_TIMEOUT_S):
            found = await read_records(self._transport, mine.model, self._num_blocks)
        others = [record for record in found if record.peer_id != self._peer_id and record.revision == mine.revision]
        return [*others, mine]

    async def _store(self, claim: MoveClaim) -> None:
        key, value = claims_key(self._announcer.published.model), seal_claim(claim, self._sign)
        async with asyncio.timeout(_STORE_TIMEOUT_S):
            # Whether it is there, is seen when the claims are read: a directory's word is that of one of its peers.
            await self._transport.directory.store(key, self._peer_id, value, claim.expires_at_s)

    async def _claims(self) -> list[MoveClaim]:
        mine = self._announcer.published
        key = claims_key(mine.model)
        async with asyncio.timeout(_LOOKUP_TIMEOUT_S):
            found = await self._transport.directory.lookup([key])
        claims = claims_among(found.get(key, {}), verify, self._transport.now_s())
        return [claim for claim in claims if claim.revision == mine.revision]

    @property
    def _peer_id(self) -> PeerId:
        return self._transport.peer_id

    async def _sleep_until(self, then_s: float) -> None:
        await asyncio.sleep(max(0.0, then_s - self._transport.now_s()))
