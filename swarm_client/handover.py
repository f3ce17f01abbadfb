"""Move what one hop of a session holds to another node while steps go on: the client's part of draining.

A node that leaves says so on the session's stream. From then on, in the background,

    1. a node is looked for that holds the same blocks with the same numerics, a session is opened there, and it copies
       what is cached from the node that leaves (`CopySession`);
    2. where there is none, the client looks again until the node is gone, and the session then recovers as from any
       other loss, by having its tape computed at whatever nodes there are;
    3. before the next step, the few tokens that came since are played from the tape, and the legs are exchanged.

What was copied is good up to the lowest position that any step rolled back to meanwhile. If rows were permuted, or
there is no tape, the rest is copied once more, while no step runs. Whatever goes wrong, the session stays where it is.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from swarm_client.leg import Leg
from swarm_client.replay import SourceLostError
from swarm_client.twins import MovingSession, Twins
from swarm_protocol.errors import (
    SwarmError,
    TapeLostError,
    UnexpectedMessageError,
)
from swarm_protocol.ids import PeerId, short_peer
from swarm_protocol.messages import (
    Draining,
)

logger = logging.getLogger(__name__)

LOOK_AGAIN_S = 2.0
"""Between two tries to find a node that takes over."""

CATCH_UP_TOKENS = 64
"""More than these are copied and not played: playing keeps the next step waiting as a prompt of so many tokens does."""

PAUSE_S = 0.5
"""Between two rounds of copying, while a long prompt is computed: each takes two new streams at both nodes."""

LISTEN_AFTER_S = 1.0
"""Without a step, until what the nodes say of themselves is read between steps, too."""

LONGEST_S = 3600.0
"""A node may say that it leaves later; it is taken to leave then."""


@dataclass(slots=True, eq=False)
class _Move:
    """A leg on its way. `position` tokens are at the new one, of which those from `lowest` on are not good any more.

    `found` is None until that is ready.
    """

    leg: Leg
    deadline_s: float
    found: Leg | None = None
    position: int = 0
    lowest: int = 0
    is_permuted: bool = False

    @property
    def kept(self) -> int:
        """How many tokens are good at the new leg."""
        return 0 if self.is_permuted else min(self.position, self.lowest)


class Handovers:
    """The moves of one session. Belongs to the event loop."""

    def __init__(self, session: MovingSession, twins: Twins, settle: Callable[[], Awaitable[None]]) -> None:
        """`settle` completes the steps that were cancelled, or raises SwarmError."""
        self._session = session
        self._twins = twins
        self._settle = settle
        self._moves: dict[_Move, asyncio.Task[None]] = {}
        self._rewinds_to: int | None = None
        self._is_permuting = False
        self._is_stepping = False
        self._has_tape = True
        self._listening: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ended_s = 0.0
        self._is_closed = False

    def watch(self, legs: Sequence[Leg]) -> None:
        """Hear of it when a node of these legs leaves."""
        for leg in legs:
            leg.stream.on_draining(partial(self._told, leg))

    def _told(self, leg: Leg, notice: Draining) -> None:
        if leg not in self._session.legs or any(move.leg is leg for move in self._moves):
            return
        logger.info("%s leaves, moving %s", short_peer(leg.peer_id), leg.hop.span)
        self._begin(_Move(leg, _now_s() + min(notice.leave_s, LONGEST_S)))

    # around steps

    @asynccontextmanager
    async def stepping(self, position: int, row_order: tuple[int, ...] | None = None) -> AsyncIterator[None]:
        """A step runs inside. Before it cancelled ones are settled, and the legs that are ready are exchanged."""
        self._is_stepping = True
        try:
            if self._listening is not None:
                await self._stop_listening()
            await self._settle()
            await self._before_step(position, row_order)
            yield
        finally:
            self._is_stepping = False
            self._ended_s = _now_s()
            self._look_later(LISTEN_AFTER_S)

    async def _before_step(self, position: int, row_order: tuple[int, ...] | None) -> None:
        """Exchange the legs that are ready, and note what the next step does to what is being copied."""
        for move in list(self._moves):
            if move.found is not None:
                await self._finish(move, move.found, position)
        self._rewinds_to = position if position < self._session.length else None
        self._is_permuting = row_order is not None
        for move in self._moves:
            self._note(move)

    async def close(self) -> None:
        """End all moves. Idempotent."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        await self._stop_listening()
        moves, self._moves = self._moves, {}
        for task in moves.values():
            task.cancel()
        await asyncio.gather(*moves.values(), return_exceptions=True)
        found = [move.found for move in moves if move.found is not None]
        await asyncio.gather(*(leg.stream.close() for leg in found), return_exceptions=True)

    # moving

    def _begin(self, move: _Move) -> None:
        self._moves[move] = asyncio.create_task(self._prepare(move), name="hand-over")

    async def _prepare(self, move: _Move) -> None:
        """Bring another leg to where `move.leg` is, as long as there is time."""
        passed_over: set[PeerId] = set()
        while _now_s() < move.deadline_s and move.leg in self._session.legs:
            try:
                found = await self._twins.open(move.leg, passed_over)
                passed_over.add(found.peer_id)
                if await self._copied(move, found, 0):
                    return
            except SwarmError as error:
                logger.info("%s cannot move yet: %s", move.leg.hop.span, error)
                await asyncio.sleep(min(LOOK_AGAIN_S, max(0.0, move.deadline_s - _now_s())))
                passed_over.clear()
        self._moves.pop(move, None)

    async def _copied(self, move: _Move, found: Leg, position: int) -> bool:
        """Copy from `position` on to the new leg until so little is missing that it can be played.

        Returns whether that went well; the leg is given up if not.
        """
        try:
            while True:
                self._start_noting(move)
                move.position = await self._copy(move, found, min(position, self._session.length))
                if move.is_permuted or self._session.length - move.kept <= CATCH_UP_TOKENS:
                    break
                await asyncio.sleep(PAUSE_S)
                position = move.kept
            await self._stop_listening()
        except BaseException as error:
            self._twins.end(found)
            if not isinstance(error, SwarmError):
                raise
            logger.info("%s could not copy: %s", short_peer(found.peer_id), error)
            return False
        self._is_ready(move, found)
        return True

    async def _copy_on(self, move: _Move, found: Leg) -> None:
        """Copy what a long step has added to what was copied before. If that fails, the move begins again."""
        if not await self._copied(move, found, move.kept):
            await self._prepare(move)

    async def _copy(self, move: _Move, found: Leg, position: int) -> int:
        return await self._twins.copy(move.leg, found, position, move.deadline_s - _now_s())

    def _is_ready(self, move: _Move, found: Leg) -> None:
        """The new leg is there: exchange them now if nothing is missing and no step runs, else before the next."""
        move.found = found
        is_held = move in self._moves and move.leg in self._session.legs
        if is_held and (self._is_stepping or move.kept < self._session.length):
            return
        self._moves.pop(move, None)
        if is_held:
            self._exchange(move, found)
        else:
            self._twins.end(found)

    async def _finish(self, move: _Move, found: Leg, position: int) -> None:
        """Let the new leg take over before a step at `position`; if it cannot, the move begins again."""
        self._moves.pop(move)
        move.found = None
        if move.leg not in self._session.legs:
            self._twins.end(found)
            return
        if not move.is_permuted and position - move.kept > CATCH_UP_TOKENS:
            self._moves[move] = asyncio.create_task(self._copy_on(move, found), name="hand-over")
            return
        try:
            await self._catch_up(move, found, position)
        except BaseException as error:
            self._twins.end(found)
            self._begin(_Move(move.leg, move.deadline_s))
            if not isinstance(error, SwarmError | SourceLostError):
                raise
            logger.info("%s stays where it is for now: %s", move.leg.hop.span, error)
        else:
            self._exchange(move, found)

    async def _catch_up(self, move: _Move, found: Leg, position: int) -> None:
        kept = min(move.kept, position)
        if kept == position:
            return
        if self._has_tape and not move.is_permuted:
            try:
                await self._session.play(found, move.leg, kept, position)
            except SourceLostError as problem:
                self._has_tape = not isinstance(problem.error, TapeLostError)  # the next time it is copied
                raise
        elif await self._copy(move, found, kept) < position:
            raise UnexpectedMessageError("the node that leaves has fewer tokens than it was given")

    def _exchange(self, move: _Move, found: Leg) -> None:
        there = f"{short_peer(found.peer_id)}[{found.hop.span}]"
        logger.info("moved %s to %s, %d tokens were copied", move.leg.hop.span, there, move.kept)
        self._session.exchange(move.leg, [found], "node_leaving")

    def _start_noting(self, move: _Move) -> None:
        """From now on what steps do counts, with the one that may run now."""
        move.lowest, move.is_permuted = 1 << 62, False
        if self._is_stepping:
            self._note(move)

    def _note(self, move: _Move) -> None:
        if self._rewinds_to is not None:
            move.lowest = min(move.lowest, self._rewinds_to)
        move.is_permuted |= self._is_permuting

    # between steps

    def _look_later(self, wait_s: float) -> None:
        if self._timer is None and not self._is_closed:
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._look)

    def _look(self) -> None:
        """Listen if no step ran for a while, else look again later."""
        self._timer = None
        if self._is_stepping or self._listening is not None:
            return
        wait_s = self._ended_s + LISTEN_AFTER_S - _now_s()
        if wait_s > 0:
            self._look_later(wait_s)
        else:
            self._listening = asyncio.create_task(self._listen(), name="listening")

    async def _listen(self) -> None:
        await asyncio.gather(*(leg.stream.listen() for leg in self._session.legs))

    async def _stop_listening(self) -> None:
        listening, self._listening = self._listening, None
        if listening is not None:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            self._look_later(LISTEN_AFTER_S)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
