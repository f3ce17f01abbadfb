"""The legs of one session: how they are opened, replaced and exchanged. Belongs to the event loop.

When a node dies, freezes, leaves, runs full or answers wrongly, its blocks are given to other nodes, one or several,
which are played what went into it: the client has that for the first hop, the node before for each other one. All
others keep their caches.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count

from swarm_client.config import ClientConfig
from swarm_client.events import RouteReason
from swarm_client.leg import Flight, Leg
from swarm_client.prefix_hashes import TokenPrefix
from swarm_client.recovery import Patience, has_forgotten, is_wrong_answer, reason_of, stays_usable
from swarm_client.replay import Replay, SourceLostError
from swarm_client.reservation import tokens_to_reserve
from swarm_client.routing.find_route import Hop
from swarm_client.routing.watcher import SwarmWatcher
from swarm_client.sent import NotBroughtError
from swarm_client.session_news import LOOK_AGAIN_S, SessionNews
from swarm_client.session_streams import SessionStreams, is_nodes_fault
from swarm_protocol.errors import (
    CacheFullError,
    MissingBlocksError,
    PeerUnreachableError,
    SessionClosedError,
    StepTimeoutError,
    StreamLostError,
    SwarmError,
    TapeLostError,
)
from swarm_protocol.ids import PeerId, short_peer
from swarm_protocol.messages import WireTensor
from swarm_protocol.prompt_pages import PromptPages
from swarm_protocol.spans import Span
from swarm_protocol.tape import Tape, TapeBudget

logger = logging.getLogger(__name__)


class SessionRoute:
    """The legs of a session in the order of their blocks, and what went into the first of them.

    `now_s` is the swarm's clock. `on_new` hears of legs that have come; `standby_of` gives the leg that stands by for
    one that has failed, and how many tokens are there already.
    """

    def __init__(
        self,
        streams: SessionStreams,
        watcher: SwarmWatcher,
        config: ClientConfig,
        news: SessionNews,
        batch_size: int,
        max_length: int,
        tapes: TapeBudget,
        now_s: Callable[[], float],
    ) -> None:
        self.legs: list[Leg] = []
        self.tape = Tape(tapes)
        self.on_new: Callable[[Sequence[Leg]], None] = lambda _: None
        self.standby_of: Callable[[Leg], Awaitable[tuple[Leg, int] | None]] = _nobody
        self._streams = streams
        self._watcher = watcher
        self._config = config
        self._news = news
        self._batch_size = batch_size
        self._max_length = max_length
        self._now_s = now_s
        self._prompt = PromptPages(tapes.prefixes, ())
        self._has_lost_tape = False
        self._last_states: WireTensor | None = None
        self._first_hops: Sequence[Hop] = ()

    @property
    def hops(self) -> list[Hop]:
        """What the legs are for."""
        return [leg.hop for leg in self.legs]

    def wire_dtype(self, own: str) -> str:
        """Return the dtype in which states travel that the caller has in `own`: the same until the session ends."""
        return self._streams.wire_dtype(self._first_hops, own)

    @property
    def is_whole(self) -> bool:
        """Whether every hop can be given to another node; not if a tape was found not to have fitted anywhere."""
        return self.tape.is_whole and not self._has_lost_tape

    @property
    def has_failed_leg(self) -> bool:
        """Whether a leg waits to be replaced."""
        return any(leg.failure is not None for leg in self.legs)

    @property
    def length(self) -> int:
        """The tokens that went into the first hop, those of a step that runs included."""
        return self.tape.length

    def check_open(self) -> None:
        """Raise SessionClosedError unless there are legs."""
        if not self.legs:
            raise SessionClosedError("the session is closed; open a new one")

    async def open(self, num_tokens: int, prefix: TokenPrefix | None = None) -> int:
        """Find a route and reserve the caches for `num_tokens` tokens and some more.

        Returns how many tokens of `prefix` are cached at every node, where steps may start. Nodes that fail are
        avoided, and another route is tried at once, `ClientConfig.route_attempts` times. Blocks whose nodes are gone or
        that nobody serves are waited for, `ClientConfig.max_wait_s` long.
        Raises what the last try raised: MissingBlocksError, CacheFullError, PeerUnreachableError and the like.
        """
        reserved = tokens_to_reserve(num_tokens, self._config.reserve_tokens, self._max_length)
        pages = self._streams.hashes((), prefix)
        patience = self._news.patience(self._config.max_wait_s)
        for attempt in count(1):
            find = partial(self._streams.find_route, reserved, pages, is_retry=attempt > 1)
            hops = await self._news.until_served(find, patience)
            try:
                named = prefix and replace(prefix, dtype=self._streams.wire_dtype(hops, prefix.dtype))
                legs, cached = await self._streams.open(hops, reserved, named)
            except SwarmError as error:
                if not is_nodes_fault(error):
                    raise
                if attempt >= self._config.route_attempts and not (
                    reason_of(error) == "node_lost" and await self._news.waits(patience, self._lost(hops), error)
                ):
                    raise
                if isinstance(error, CacheFullError):
                    reserved = num_tokens  # what is needed now may still fit
                logger.info("route failed, trying another (%s): %s", attempt, error)
                continue
            self._watcher.holders.remember(pages, [hop.peer_id for hop in hops])
            self.legs, self._first_hops = legs, hops
            self._news.route_changed("opened", (), hops, hops)
            self.on_new(legs)
            self._prompt = PromptPages(self.tape.budget.prefixes, self._streams.hashes(hops[:1], named))
            return self._prompt.begin(self.tape, cached)
        raise AssertionError("unreachable")

    def _lost(self, hops: Sequence[Hop]) -> list[Span]:
        """Return the blocks of the nodes that are avoided."""
        return [hop.span for hop in hops if hop.peer_id in self._watcher.avoided]

    def entered(self, states: WireTensor, position: int, row_order: tuple[int, ...] | None) -> None:
        """A step of `states` is about to go into the first hop."""
        if row_order is not None:
            self.tape.reorder(row_order)
        self._prompt.writes(self.tape, position)
        self.tape.write(position, states)
        self._last_states = states

    def came_back(self) -> None:
        """A step is done."""
        self._prompt.keep(self.tape)

    async def close(self) -> None:
        """End all legs. Idempotent."""
        legs, self.legs = self.legs, []
        self.tape.drop()
        await asyncio.gather(*(leg.stream.close() for leg in legs), self._streams.close(), return_exceptions=True)

    @contextlib.contextmanager
    def losing(self, leg: Leg) -> Iterator[None]:
        """Lose a leg whose node was waited for as long as it is worth."""
        try:
            yield
        except NotBroughtError:
            raise
        except (PeerUnreachableError, StreamLostError, StepTimeoutError) as error:
            self.lose(leg, error)
            raise

    def upstream(self, leg: Leg) -> PeerId | None:
        """Return the node before."""
        index = self.legs.index(leg) if leg in self.legs else 0
        return self.legs[index - 1].peer_id if index else None

    def is_direct(self, first: Leg, second: Leg) -> bool:
        """Whether the first node may send on to the second, which knows of it, by itself."""
        works = self._watcher.links.works(first.peer_id, second.peer_id, self._now_s())
        return works and second.upstream == first.peer_id

    def link_failed(self, first: Leg, second: Leg) -> None:
        logger.info("%s does not reach %s", short_peer(first.peer_id), short_peer(second.peer_id))
        self._watcher.links.failed(first.peer_id, second.peer_id, self._now_s())

    # recovery

    async def replace(self, index: int, flight: Flight, error: SwarmError) -> int:
        """Give the blocks of leg `index` to other nodes, which compute again what had come before `flight`.

        Returns where the step has to go on: there, or at the leg before if that fails, too. Raises `error`, or why no
        other node could do it.
        """
        leg = self.legs[index]
        if not stays_usable(error):
            self.lose(leg, error)
        loop = asyncio.get_running_loop()
        patience = Patience(loop.time(), self._config.max_wait_s)
        self._news.listener(patience.waiting([leg.hop.span], None, loop.time()))
        if not self.is_whole:
            raise error
        if leg.failure is not None and has_forgotten(leg.failure):
            await leg.stream.close()  # its node is well, and may need the room for what comes
        logger.info("looking for other nodes for %s: %s", leg.hop.span, error)
        while True:
            try:
                found = await self._standing_by(leg, flight) or await self._other_legs(index, flight)
                break
            except SourceLostError as problem:
                if isinstance(problem.error, TapeLostError):
                    self._has_lost_tape = True
                    raise error from problem
                self.check_open()
                return await self.replace(index - 1, flight, problem.error)
            except SwarmError as problem:
                is_waited_for = leg.failure is not None and not is_wrong_answer(error)
                if isinstance(problem, MissingBlocksError) and not is_waited_for:
                    raise error from problem
                if not patience.lasts(loop.time() + LOOK_AGAIN_S) or not is_nodes_fault(problem):
                    raise
                logger.info("still looking: %s", problem)
                if isinstance(problem, NotBroughtError):
                    continue  # the way between two nodes, which is not taken again
                self._news.listener(patience.waiting([leg.hop.span], problem, loop.time()))
            await asyncio.sleep(LOOK_AGAIN_S)
            self.check_open()
        if not self.legs:  # closed meanwhile
            for new in found:
                self._streams.end(new.stream)
        self.check_open()
        self.exchange(leg, found, reason_of(error))
        route = " → ".join(f"{short_peer(new.peer_id)}[{new.hop.span}]" for new in found)
        logger.info("recovered %d tokens of %s at %s", flight.position, leg.hop.span, route)
        self._news.recovered(flight.position)
        return index

    async def _standing_by(self, leg: Leg, flight: Flight) -> list[Leg]:
        """Return the leg that stands by for one that was lost, brought to where `flight` begins; empty if none does."""
        standby = await self.standby_of(leg) if leg.failure is not None else None
        if standby is None:
            return []
        twin, kept = standby
        twin.order_for(flight.number, None)  # its tape has permuted its rows
        try:
            start = min(kept, flight.position)
            await self._play(self.around(leg)[0], [twin], start, flight.position, flight.states)
        except SwarmError as error:
            logger.info("%s stood by in vain: %s", short_peer(twin.peer_id), error)
            self._streams.end(twin.stream)
            return []
        except BaseException:
            self._streams.end(twin.stream)
            raise
        return [twin]

    async def _other_legs(self, index: int, flight: Flight) -> list[Leg]:
        """Return legs for the blocks of leg `index` at other nodes, brought to where `flight` begins."""
        leg = self.legs[index]
        source, behind = self.around(leg)
        needed = flight.position + flight.states.shape[1]
        reserved = tokens_to_reserve(needed, self._config.reserve_tokens, self._max_length)
        # Its own node only if that has lost the session: not if it refused a step of it.
        without = leg.peer_id if leg.failure is None else None
        hops = await self._streams.find_route(reserved, span=leg.hop.span, without=without)
        legs, _ = await self._streams.open(
            hops,
            reserved,
            upstream=None if source is None else source.peer_id,
            downstream=None if behind is None else behind.peer_id,
            step_number=flight.number,
        )
        try:
            await self._play(source, legs, 0, flight.position, flight.states)
        except BaseException:
            for failed in legs:
                self._streams.end(failed.stream)
            raise
        return legs

    def around(self, leg: Leg) -> tuple[Leg | None, Leg | None]:
        """Return the legs before and behind one."""
        index = self.legs.index(leg)
        before = self.legs[index - 1] if index else None
        return before, self.legs[index + 1] if index + 1 < len(self.legs) else None

    async def _play(self, source: Leg | None, legs: Sequence[Leg], start: int, end: int, like: WireTensor) -> None:
        replay = Replay(self.tape, source, legs, self.is_direct, self.link_failed, self._leg_failed)
        await replay.play(end, max(1, self._config.step_tokens // self._batch_size), like, start)

    async def play(self, new: Leg, leg: Leg, start: int, end: int) -> None:
        """Have `new` compute the tokens `[start, end)` that `leg` was given. Raises SwarmError or SourceLostError."""
        if self._last_states is None or not self.is_whole:
            raise SourceLostError(TapeLostError("what went into the session was not kept"))
        await self._play(self.around(leg)[0], [new], start, end, self._last_states)

    def exchange(self, leg: Leg, found: Sequence[Leg], reason: RouteReason) -> None:
        """Let `found` take the place of `leg`, whose session is ended."""
        index = self.legs.index(leg)
        self.legs[index : index + 1] = found
        self.on_new(found)
        self._prompt = PromptPages(self.tape.budget.prefixes, ())  # the hashes were those of other hops
        self._streams.end(leg.stream)
        self._news.route_changed(reason, [leg.hop], [new.hop for new in found], self.hops)

    def _leg_failed(self, leg: Leg, error: SwarmError) -> None:
        if is_nodes_fault(error):
            self._streams.blame(leg.peer_id, error)

    def lose(self, leg: Leg, error: SwarmError, *, is_blamed: bool = True) -> None:
        """The node of `leg` cannot go on; what it holds is given up."""
        if leg.failure is None:
            leg.failure = error
            if is_blamed and not has_forgotten(error):
                self._streams.blame(leg.peer_id, error)


async def _nobody(_: Leg) -> None:
    return None
