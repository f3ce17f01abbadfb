"""A session over a whole route: hops in a row, opened together. Belongs to the event loop.

A step goes round: from the client to the first node, from node to node, and from the last one back; each tells the
client when it is done. Whatever goes wrong on that way, the step is completed hop by hop through the client, under the
numbers that it had. When a node dies, freezes, leaves, runs full or answers wrongly, its blocks are given to other
nodes, one or several, which are played what went into it: the client has that for the first hop, the node before for
each other one. All others keep their caches.
"""

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from swarm_client.config import ClientConfig
from swarm_client.handover import Handovers
from swarm_client.leg import Flight, HopTiming, Leg, StepResult, direct_segments, own_copy
from swarm_client.pipeline import FIRST_TOKENS, LEAST_TOKENS, Turns, fly_pieces
from swarm_client.prefix_hashes import TokenPrefix
from swarm_client.recovery import (
    MAX_WRONG_ANSWERS,
    Fault,
    Patience,
    fault_of,
    has_forgotten,
    is_wrong_answer,
    reason_of,
    stays_usable,
)
from swarm_client.replay import Replay, SourceLostError
from swarm_client.routing.find_route import Hop, ModelKey
from swarm_client.routing.watcher import SwarmWatcher
from swarm_client.sent import NotBroughtError
from swarm_client.session_news import LOOK_AGAIN_S, SessionNews
from swarm_client.session_streams import SessionStreams, is_nodes_fault
from swarm_client.span_stream import tokens_to_reserve
from swarm_protocol.errors import (
    CacheFullError,
    InvalidTensorError,
    MissingBlocksError,
    PeerUnreachableError,
    SessionClosedError,
    SessionNotFoundError,
    StepTimeoutError,
    StreamLostError,
    SwarmError,
    TapeLostError,
)
from swarm_protocol.ids import PeerId, short_peer
from swarm_protocol.messages import StepReply, WireTensor
from swarm_protocol.prompt_pages import PromptPages
from swarm_protocol.tape import Tape, TapeBudget
from swarm_protocol.tensors import check_finite, from_wire
from swarm_protocol.transport.base import Transport

logger = logging.getLogger(__name__)


class SwarmSession:
    """KV caches for `batch_size` rows of up to `max_length` tokens at every node of a route; they grow with the rows.

    `prefix_key` is what the client keys its hashes of tokens with, `tapes` what may be kept for recovery.
    """

    def __init__(
        self,
        transport: Transport,
        watcher: SwarmWatcher,
        config: ClientConfig,
        model: ModelKey,
        batch_size: int,
        max_length: int,
        prefix_key: bytes,
        tapes: TapeBudget,
    ) -> None:
        self._transport = transport
        self._watcher = watcher
        self._config = config
        self._batch_size = batch_size
        self._max_length = max_length
        self.news = SessionNews()
        """Tells what happens to the route."""
        self._streams = SessionStreams(
            transport, watcher, config, model, batch_size, max_length, prefix_key, self.news.silent
        )
        self._legs: list[Leg] = []
        self._num_steps = 0
        self._tape = Tape(tapes)
        self._prompt = PromptPages(tapes.prefixes, ())
        self._flights: deque[Flight] = deque()
        self._has_lost_tape = False
        self._last_states: WireTensor | None = None
        self._handovers = Handovers(transport, self, self._streams, config, max_length)

    @property
    def route(self) -> Sequence[Hop]:
        """The hops in the order of their blocks; empty until opened."""
        return [leg.hop for leg in self._legs]

    @property
    def is_whole(self) -> bool:
        """Whether every hop can be given to another node; not if a tape was found not to have fitted anywhere."""
        return self._tape.is_whole and not self._has_lost_tape

    async def open(self, num_tokens: int, prefix: TokenPrefix | None = None) -> int:
        """Find a route and reserve the caches for `num_tokens` tokens and some more.

        Returns how many tokens of `prefix` are cached at every node, where steps may start. Nodes that fail are
        avoided, and another route is tried; blocks that nobody serves are waited for, `ClientConfig.max_wait_s` long.
        Raises what the last try raised: MissingBlocksError, CacheFullError, PeerUnreachableError and the like.
        """
        reserved = tokens_to_reserve(num_tokens, self._config.reserve_tokens, self._max_length)
        pages = self._streams.hashes((), prefix)
        for attempt in range(1, self._config.route_attempts + 1):
            find = partial(self._streams.find_route, reserved, pages, is_retry=attempt > 1)
            hops = await self.news.until_served(find, self._config.max_wait_s)
            try:
                legs, cached = await self._streams.open(hops, reserved, prefix)
            except SwarmError as error:
                if not is_nodes_fault(error) or attempt == self._config.route_attempts:
                    raise
                if isinstance(error, CacheFullError):
                    reserved = num_tokens  # what is needed now may still fit
                logger.info("route failed, trying another (%s): %s", attempt, error)
                continue
            self._watcher.holders.remember(pages, [hop.peer_id for hop in hops])
            self._legs = legs
            self.news.route_changed("opened", (), hops, hops)
            self._handovers.watch(legs)
            self._prompt = PromptPages(self._tape.budget.prefixes, self._streams.hashes(hops[:1], prefix))
            return self._prompt.begin(self._tape, cached)
        raise AssertionError("unreachable")

    async def step(
        self,
        hidden_states: WireTensor,
        position: int,
        row_order: tuple[int, ...] | None = None,
        *,
        every_span: bool = False,
    ) -> StepResult:
        """Run `hidden_states` (batch, seq, hidden) through all hops at `position`, as `messages.Step` says.

        `every_span` asks for the states after each of them. Cancelling loses nothing: the next step may go on at any
        position that was cached before. Blocks whose node fails are given to others; where there are none, they are
        waited for, `ClientConfig.max_wait_s` long. Raises SwarmError.
        """
        async with self._handovers.stepping(position, row_order):
            flight = self._take_off(hidden_states, position, row_order)
            if not every_span and len(self._legs) > 1 and hidden_states.shape[1] and not self._has_failed_leg:
                try:
                    return self._landed(flight, await self._fly(flight))
                except SwarmError as error:
                    self._check_open()
                    logger.info("going on through the client: %s", error)
            return self._landed(flight, await self._drive(flight))

    async def run(
        self, cut: Callable[[int, int], WireTensor], num_tokens: int, position: int, *, every_span: bool = False
    ) -> list[StepResult]:
        """Run `num_tokens` tokens at `position` in steps that are small enough, and several of them at once.

        `cut(start, end)` gives their states (batch, end - start, hidden). Cancelling and errors are as in `step`.
        """
        self._check_open()
        most = max(1, self._config.step_tokens // self._batch_size)
        results: list[StepResult] = []
        if len(self._legs) > 1 and num_tokens >= FIRST_TOKENS + LEAST_TOKENS and not every_span:
            async with self._handovers.stepping(position):
                try:
                    await fly_pieces(
                        lambda start, end: self._take_off(cut(start, end), position + start),
                        self._fly,
                        lambda flight, result: results.append(self._landed(flight, result)),
                        num_tokens,
                        len(self._legs),
                        most,
                    )
                except BaseExceptionGroup as problems:
                    if problems.split(SwarmError)[1] is not None:
                        raise
                    self._check_open()
                    logger.info("going on through the client: %s", problems.exceptions[0])
                while self._flights:
                    flight = self._flights[0]
                    results.append(self._landed(flight, await self._drive(flight)))
        done = sum(result.outputs[-1].shape[1] for result in results)
        while done < num_tokens or not results:
            end = min(num_tokens, done + most)
            results.append(await self.step(cut(done, end), position + done, every_span=every_span))
            done = end
        return results

    async def close(self) -> None:
        """Free the caches at every node. Idempotent."""
        await self._handovers.close()
        legs, self._legs = self._legs, []
        self._tape.drop()
        self._flights.clear()
        await asyncio.gather(*(leg.stream.close() for leg in legs), self._streams.close(), return_exceptions=True)

    def _check_open(self) -> None:
        if not self._legs:
            raise SessionClosedError("the session is closed; open a new one")

    # the life of a step

    def _take_off(self, hidden_states: WireTensor, position: int, row_order: tuple[int, ...] | None = None) -> Flight:
        self._check_open()
        if not self._flights:
            self.news.advanced()
        self._num_steps += 1
        states = own_copy(hidden_states)
        if row_order is not None:
            self._tape.reorder(row_order)
        self._tape.write(position, states)
        self._last_states = states
        flight = Flight(self._num_steps, states, position, row_order)
        self._flights.append(flight)
        return flight

    def _landed(self, flight: Flight, result: StepResult) -> StepResult:
        if self._flights[0] is not flight:
            raise StreamLostError("a piece before this one did not come back")
        self._flights.popleft()
        self.news.advanced()
        self._prompt.keep(self._tape, flight.position)
        return result

    async def settle(self) -> None:
        """Complete the steps that were cancelled: nodes may have got them, or get them yet."""
        self._check_open()
        while self._flights:
            flight = self._flights[0]
            try:
                self._landed(flight, await self._drive(flight))
            except SwarmError as error:
                if is_nodes_fault(error):
                    raise
                logger.info("a cancelled step could not be completed: %s", error)

    def _give_up(self, flight: Flight) -> None:
        """The step failed for good, and those behind it, too. A node that may have got one, or get it yet, is lost."""
        while self._flights and self._flights[-1].number >= flight.number:
            lost = self._flights.pop()
            may_come = False
            for leg in self._legs:
                sent = lost.sent.get(leg)
                if sent is not None and not sent.has_begun and not may_come:
                    leg.stream.forget(sent)
                elif sent is not None and not sent.is_answered and leg.failure is None:
                    leg.failure = SessionNotFoundError("a step is on its way that is not wanted any more")
                may_come = sent is None or (sent.error is None and (sent.has_begun or may_come))

    @property
    def _has_failed_leg(self) -> bool:
        return any(leg.failure is not None for leg in self._legs)

    async def _fly(self, flight: Flight, turns: Turns | None = None) -> StepResult:
        """Let a step go round; `turns` keep several of them in their order.

        Raises SwarmError if anything is not as it should be; the step is wherever it came to then.
        """
        legs = list(self._legs)
        for leg in legs:
            order = leg.order_for(flight.number, flight.row_order)
            flight.sent[leg] = leg.stream.plan(flight.states.shape, flight.states.dtype, flight.position, order)
        links = [self._is_direct(first, second) for first, second in itertools.pairwise(legs)]
        states, timings = flight.states, list[HopTiming]()
        clock = asyncio.get_running_loop().time
        ended_s = clock()
        for segment in direct_segments(links):
            for index in segment:
                async with contextlib.nullcontext() if turns is None else turns.locks[index]:
                    if index == segment.start:
                        await self._set_out(flight, [legs[other] for other in segment], states)
                    reply = await self._come_by(flight, legs, index, is_brought=index != segment.start)
                began_s, ended_s = ended_s, clock()
                timings.append(_timing(legs[index], reply, ended_s - began_s))
                if turns is not None:
                    turns.done(index, timings[-1])
                states = reply.hidden_states
                if index != segment[-1] and states.shape == flight.states.shape:
                    self._link_failed(legs[index], legs[index + 1])
                    raise NotBroughtError(f"{short_peer(legs[index].peer_id)} does not reach the next node")
        check_finite(from_wire(states))
        for timing in timings:
            self._watcher.stepped(timing.hop, flight.num_tokens, timing.total_s)
        return StepResult((states,), tuple(timings))

    async def _set_out(self, flight: Flight, legs: Sequence[Leg], states: WireTensor) -> None:
        """Give a step to the first of `legs`, to go on through all of them."""
        onward = tuple(leg.stream.onward(flight.sent[leg]) for leg in legs[1:])
        first = legs[0]
        with self._losing(first):
            await first.stream.send(flight.sent[first], states, onward, upstream=self._upstream(first))

    async def _come_by(self, flight: Flight, legs: Sequence[Leg], index: int, *, is_brought: bool) -> StepReply:
        """Wait until a step is through one of the legs."""
        leg = legs[index]
        try:
            with self._losing(leg):
                reply = await leg.stream.reply(flight.sent[leg], is_brought=is_brought)
        except NotBroughtError:
            self._link_failed(legs[index - 1], leg)
            raise
        leg.upstream = self._upstream(leg)
        return reply

    @contextlib.contextmanager
    def _losing(self, leg: Leg) -> Iterator[None]:
        """Lose a leg whose node was waited for as long as it is worth."""
        try:
            yield
        except NotBroughtError:
            raise
        except (PeerUnreachableError, StreamLostError, StepTimeoutError) as error:
            self._lose(leg, error)
            raise

    def _upstream(self, leg: Leg) -> PeerId | None:
        """Return the node before."""
        index = self._legs.index(leg) if leg in self._legs else 0
        return self._legs[index - 1].peer_id if index else None

    def _is_direct(self, first: Leg, second: Leg) -> bool:
        """Whether the first node may send on to the second, which knows of it, by itself."""
        works = self._watcher.links.works(first.peer_id, second.peer_id, self._transport.now_s())
        return works and second.upstream == first.peer_id

    def _link_failed(self, first: Leg, second: Leg) -> None:
        logger.info("%s does not reach %s", short_peer(first.peer_id), short_peer(second.peer_id))
        self._watcher.links.failed(first.peer_id, second.peer_id, self._transport.now_s())

    async def _drive(self, flight: Flight) -> StepResult:
        """Bring a step through all hops one by one, wherever it had come to, and replace the nodes that fail."""
        states, timings = [flight.states], list[HopTiming]()
        num_wrong = 0
        try:
            while (index := len(states) - 1) < len(self._legs):
                leg = self._legs[index]
                was_here = leg in flight.sent and flight.sent[leg].is_answered
                try:
                    reply, timing = await self._visit(flight, index, states[index])
                except SwarmError as error:
                    self._check_open()
                    num_wrong += is_wrong_answer(error)
                    if num_wrong == MAX_WRONG_ANSWERS:
                        raise
                    lost = self._lost_leg(error, index, states[index], flight)
                    lost = await self._replace(lost, flight, error)
                    del states[lost + 1 :], timings[lost:]
                else:
                    self._check_open()
                    self._watcher.stepped(leg.hop, flight.num_tokens, timing.total_s)
                    if not was_here:
                        self.news.advanced()
                    states.append(reply)
                    timings.append(timing)
        except SwarmError:
            self._give_up(flight)
            raise
        return StepResult(tuple(states[1:]), tuple(timings))

    async def _visit(self, flight: Flight, index: int, states: WireTensor) -> tuple[WireTensor, HopTiming]:
        """Return what one node makes of a step. The last one's output is checked: others' the next node sees."""
        leg = self._legs[index]
        if leg.failure is not None:
            raise leg.failure.with_traceback(None)
        clock = asyncio.get_running_loop().time
        started_s = clock()
        sent, upstream = flight.sent.get(leg), self._upstream(leg)
        if sent is not None and not sent.is_answered:
            try:
                await leg.stream.send(sent, states, upstream=upstream)
                await leg.stream.reply(sent)
            except CacheFullError:
                if sent.max_tokens is None or sent.max_tokens <= flight.position + states.shape[1]:
                    raise
        if sent is not None and sent.reply is not None:
            reply, output = sent.reply, await leg.stream.output(sent)
        elif sent is not None and sent.error is not None and (sent.row_order or not leg.stream.is_settled):
            raise sent.error
        else:
            order = leg.order_for(flight.number, flight.row_order)
            reply = await leg.stream.step(states, flight.position, order, upstream=upstream)
            output = reply.hidden_states
        leg.upstream = upstream
        if leg is self._legs[-1]:
            check_finite(from_wire(output))
        return output, _timing(leg, reply, clock() - started_s)

    def _lost_leg(self, error: SwarmError, index: int, states: WireTensor, flight: Flight) -> int:
        """Return the index of the leg that is to be replaced. Raises `error` if that would not help."""
        fault = fault_of(error, is_first_hop=index == 0, is_input_finite=_is_finite(states))
        if fault is Fault.CALLER:
            raise error
        if flight.row_order is not None:  # whether the node had permuted its rows when it refused is not known
            self._lose(self._legs[index], error, is_blamed=fault is Fault.NODE)
        return index if fault is Fault.NODE else index - 1

    # recovery

    async def _replace(self, index: int, flight: Flight, error: SwarmError) -> int:
        """Give the blocks of leg `index` to other nodes, which compute again what had come before `flight`.

        Returns where the step has to go on: there, or at the leg before if that fails, too. Raises `error`, or why no
        other node could do it.
        """
        leg = self._legs[index]
        if not stays_usable(error):
            self._lose(leg, error)
        loop = asyncio.get_running_loop()
        patience = Patience(loop.time(), self._config.max_wait_s)
        self.news.listener(patience.waiting([leg.hop.span], None, loop.time()))
        if not self.is_whole:
            raise error
        if leg.failure is not None and has_forgotten(leg.failure):
            await leg.stream.close()  # its node is well, and may need the room for what comes
        logger.info("looking for other nodes for %s: %s", leg.hop.span, error)
        while True:
            try:
                found = await self._other_legs(index, flight)
                break
            except SourceLostError as problem:
                if isinstance(problem.error, TapeLostError):
                    self._has_lost_tape = True
                    raise error from problem
                self._check_open()
                return await self._replace(index - 1, flight, problem.error)
            except SwarmError as problem:
                is_waited_for = leg.failure is not None and not is_wrong_answer(error)
                if isinstance(problem, MissingBlocksError) and not is_waited_for:
                    raise error from problem
                if not patience.lasts(loop.time() + LOOK_AGAIN_S) or not is_nodes_fault(problem):
                    raise
                logger.info("still looking: %s", problem)
                if isinstance(problem, NotBroughtError):
                    continue  # the way between two nodes, which is not taken again
                self.news.listener(patience.waiting([leg.hop.span], problem, loop.time()))
            await asyncio.sleep(LOOK_AGAIN_S)
            self._check_open()
        if not self._legs:  # closed meanwhile
            for new in found:
                self._streams.end(new.stream)
        self._check_open()
        self.exchange(leg, found)
        route = " → ".join(f"{short_peer(new.peer_id)}[{new.hop.span}]" for new in found)
        logger.info("recovered %d tokens of %s at %s", flight.position, leg.hop.span, route)
        self.news.route_changed(reason_of(error), [leg.hop], [new.hop for new in found], self.route)
        self.news.recovered(flight.position)
        return index

    async def _other_legs(self, index: int, flight: Flight) -> list[Leg]:
        """Return legs for the blocks of leg `index` at other nodes, brought to where `flight` begins."""
        leg = self._legs[index]
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
        index = self._legs.index(leg)
        before = self._legs[index - 1] if index else None
        return before, self._legs[index + 1] if index + 1 < len(self._legs) else None

    async def _play(self, source: Leg | None, legs: Sequence[Leg], start: int, end: int, like: WireTensor) -> None:
        replay = Replay(self._tape, source, legs, self._is_direct, self._link_failed, self._leg_failed)
        await replay.play(end, max(1, self._config.step_tokens // self._batch_size), like, start)

    # moving from a node that leaves (`handover.py`)

    @property
    def legs(self) -> Sequence[Leg]:
        """The legs behind the hops."""
        return self._legs

    @property
    def length(self) -> int:
        """The tokens that went into the first hop, those of a step that runs included."""
        return self._tape.length

    async def play(self, new: Leg, leg: Leg, start: int, end: int) -> None:
        """Have `new` compute the tokens `[start, end)` that `leg` was given. Raises SwarmError or SourceLostError."""
        if self._last_states is None or not self.is_whole:
            raise SourceLostError(TapeLostError("what went into the session was not kept"))
        await self._play(self.around(leg)[0], [new], start, end, self._last_states)

    def exchange(self, leg: Leg, found: Sequence[Leg]) -> None:
        """Let `found` take the place of `leg`, whose session is ended."""
        index = self._legs.index(leg)
        self._legs[index : index + 1] = found
        self._handovers.watch(found)
        self._prompt = PromptPages(self._tape.budget.prefixes, ())  # the hashes were those of other hops
        self._streams.end(leg.stream)

    def _leg_failed(self, leg: Leg, error: SwarmError) -> None:
        if is_nodes_fault(error):
            self._streams.blame(leg.peer_id, error)

    def _lose(self, leg: Leg, error: SwarmError, *, is_blamed: bool = True) -> None:
        """The node of `leg` cannot go on; what it holds is given up."""
        if leg.failure is None:
            leg.failure = error
            if is_blamed and not has_forgotten(error):
                self._streams.blame(leg.peer_id, error)


def _timing(leg: Leg, reply: StepReply, total_s: float) -> HopTiming:
    # The client may hear late that a node is done, and then of the next one at once.
    return HopTiming(leg.hop, max(total_s, reply.queue_s + reply.compute_s), reply.queue_s, reply.compute_s)


def _is_finite(states: WireTensor) -> bool:
    try:
        check_finite(from_wire(states))
    except InvalidTensorError:
        return False
    return True
