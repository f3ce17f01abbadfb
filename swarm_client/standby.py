"""A second node for each hop, which follows along and takes over at once when the first one fails.

What a hop's node caches is copied to the second one in the background, some tokens at a time, by the nodes themselves.
When the first one fails, what is missing is played from the tape, a few tokens, and not the whole session.
"""

import asyncio
import logging
from collections.abc import Sequence

from swarm_client.leg import Leg
from swarm_client.twins import MovingSession, Twins
from swarm_protocol.errors import SwarmError
from swarm_protocol.ids import PeerId, short_peer

logger = logging.getLogger(__name__)

FOLLOW_TOKENS = 32
"""So many may be missing before more is copied: playing them takes a fraction of a second, a copy two trips."""

LOOK_AGAIN_S = 5.0
"""Between two tries to find a second node."""

UNDER_WAY_S = 0.3
"""For a copy that is under way when the first node fails; it can hardly end without it."""


class _Follower:
    """The second node of one leg: `twin` is None until there is one, `kept` the tokens that are good there."""

    def __init__(self, leg: Leg) -> None:
        self.leg = leg
        self.twin: Leg | None = None
        self.kept = 0
        self.lowest = 0
        self.is_wanted = asyncio.Event()
        self.is_idle = asyncio.Event()
        self.is_idle.set()


class Standbys:
    """The followers of one session. Belongs to the event loop."""

    def __init__(self, session: MovingSession, twins: Twins) -> None:
        self._session = session
        self._twins = twins
        self._followers: dict[Leg, tuple[_Follower, asyncio.Task[None]]] = {}
        self._steps_from: int | None = None

    def watch(self, legs: Sequence[Leg]) -> None:
        """Let a second node follow each of these."""
        for leg in legs:
            follower = _Follower(leg)
            self._followers[leg] = follower, asyncio.create_task(self._follow(follower), name="standby")

    def steps(self, position: int, row_order: tuple[int, ...] | None) -> None:
        """A step begins at `position`: what is behind it, or all of it if rows are permuted, has to be copied again."""
        good = self._steps_from = 0 if row_order is not None else position
        for follower, _ in self._followers.values():
            follower.kept = min(follower.kept, good)
            follower.lowest = min(follower.lowest, good)

    def stepped(self) -> None:
        """The step is through all nodes; one that fails or is cancelled may be anywhere until the next one is."""
        self._steps_from = None
        for follower, _ in self._followers.values():
            if self._session.length - follower.kept >= FOLLOW_TOKENS or not follower.kept:
                follower.is_wanted.set()

    async def take(self, leg: Leg) -> tuple[Leg, int] | None:
        """Return the second leg of one that has failed, and how many tokens are good there; None if there is none."""
        follower, task = self._followers.pop(leg, (None, None))
        if follower is None or task is None:
            return None
        try:
            async with asyncio.timeout(UNDER_WAY_S):
                await follower.is_idle.wait()
        except TimeoutError:
            follower.kept = 0
        twin, follower.twin = follower.twin, None
        task.cancel()
        if twin is not None and not follower.kept:
            self._twins.end(twin)
            return None
        return None if twin is None else (twin, follower.kept)

    async def close(self) -> None:
        """End all of them. Idempotent."""
        followers, self._followers = self._followers, {}
        for _, task in followers.values():
            task.cancel()
        await asyncio.gather(*(task for _, task in followers.values()), return_exceptions=True)

    async def _follow(self, follower: _Follower) -> None:
        passed_over: set[PeerId] = set()
        try:
            while follower.leg in self._session.legs:
                await follower.is_wanted.wait()
                follower.is_wanted.clear()
                if follower.leg not in self._session.legs:
                    break
                try:
                    await self._copy(follower, passed_over)
                    passed_over.clear()
                except SwarmError as error:
                    logger.info("no node stands by for %s: %s", follower.leg.hop.span, error)
                    if follower.twin is None:
                        passed_over.clear()
                        await asyncio.sleep(LOOK_AGAIN_S)
                    else:
                        passed_over.add(follower.twin.peer_id)
                        self._give_up(follower)
                    follower.is_wanted.set()
        finally:
            self._give_up(follower)
            self._followers.pop(follower.leg, None)

    async def _copy(self, follower: _Follower, passed_over: set[PeerId]) -> None:
        leg = follower.leg
        if follower.twin is None:
            twin = await self._twins.open(leg, passed_over)
            follower.twin, follower.kept = twin, 0
            logger.info("%s stands by for %s", short_peer(twin.peer_id), leg.hop.span)
        # Where a step runs that rolls back, its node may still have what was there before.
        follower.lowest = self._session.length if self._steps_from is None else self._steps_from
        follower.is_idle.clear()
        try:
            position = await self._twins.copy(leg, follower.twin, min(follower.kept, self._session.length), 0.0)
        finally:
            follower.is_idle.set()
        follower.kept = min(position, follower.lowest)

    def _give_up(self, follower: _Follower) -> None:
        twin, follower.twin, follower.kept = follower.twin, None, 0
        if twin is not None:
            self._twins.end(twin)
