"""What a session over a route tells of itself, as events for one listener. Belongs to the event loop."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from swarm_client.events import (
    NO_ANSWER,
    EventListener,
    Prefilled,
    Recovered,
    RouteChanged,
    RoutePart,
    RouteReason,
    Waiting,
)
from swarm_client.recovery import Patience
from swarm_client.routing.find_route import Hop
from swarm_protocol.errors import MissingBlocksError, SwarmError
from swarm_protocol.spans import Span

logger = logging.getLogger(__name__)

LOOK_AGAIN_S = 1.0
"""Between two looks for nodes that could take over blocks that nobody serves."""


class SessionNews:
    """`listener` is called on the loop, and must neither block nor raise."""

    def __init__(self) -> None:
        self.listener: EventListener = lambda event: None
        self._silent_told_s = float("-inf")
        self._advanced_s = 0.0
        self._has_waited = False  # for blocks of the first route

    def route_changed(
        self, reason: RouteReason, left: Sequence[Hop], joined: Sequence[Hop], route: Sequence[Hop]
    ) -> None:
        """The blocks of `left` are at `joined` now."""
        self.listener(RouteChanged(reason, _parts(left), _parts(joined), _parts(route)))
        if self._has_waited:
            self._has_waited = False
            self.recovered(0)

    def advanced(self) -> None:
        """A step begins, or came by a node."""
        self._advanced_s = asyncio.get_running_loop().time()

    def prefilled(self, done: int, total: int) -> None:
        """So many tokens of a prompt came through the whole route."""
        self.listener(Prefilled(done, total))

    def recovered(self, num_tokens: int) -> None:
        """What went wrong since the session advanced last is made good."""
        began_s = self._advanced_s
        self.advanced()
        self.listener(Recovered(self._advanced_s - began_s, num_tokens))

    def silent(self, hop: Hop) -> None:
        """The node of `hop` gives no sign of life, and nobody else has its blocks; told once a second at most."""
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._silent_told_s + LOOK_AGAIN_S:
            self._silent_told_s = now_s
            self.listener(Waiting((hop.span,), NO_ANSWER, 0.0, None))

    def patience(self, max_wait_s: float) -> Patience:
        """Return how long the session waits for its first route from now on."""
        self.advanced()
        return Patience(asyncio.get_running_loop().time(), max_wait_s)

    async def until_served(self, find: Callable[[], Awaitable[list[Hop]]], patience: Patience) -> list[Hop]:
        """Return what `find` finds as soon as every block has a node.

        Raises MissingBlocksError when `patience` ends before, and what else `find` raises.
        """
        while True:
            try:
                return await find()
            except MissingBlocksError as problem:
                if not await self.waits(patience, (), problem):
                    raise

    async def waits(self, patience: Patience, spans: Sequence[Span], problem: SwarmError) -> bool:
        """Wait before the next look for nodes that serve `spans`; False, at once, if there is no time for another."""
        clock = asyncio.get_running_loop().time
        if not patience.lasts(clock() + LOOK_AGAIN_S):
            return False
        logger.info("waiting for a route: %s", problem)
        self._has_waited = True
        self.listener(patience.waiting(spans, problem, clock()))
        await asyncio.sleep(LOOK_AGAIN_S)
        return True


def _parts(hops: Sequence[Hop]) -> tuple[RoutePart, ...]:
    return tuple(RoutePart(hop.span, hop.peer_id) for hop in hops)
