"""A session over a whole route: hops in a row, opened together. Belongs to the event loop.

A step goes round: from the client to the first node, from node to node, and from the last one back; each tells the
client when it is done. Whatever goes wrong on that way, the step is completed hop by hop through the client, under the
numbers that it had. `session_route.py` says what becomes of nodes that fail.
"""

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from swarm_client.config import ClientConfig
from swarm_client.handover import Handovers
from swarm_client.leg import Flight, HopTiming, Leg, StepResult, direct_segments
from swarm_client.pipeline import FIRST_TOKENS, LEAST_TOKENS, Turns, fly_pieces
from swarm_client.prefix_hashes import TokenPrefix
from swarm_client.recovery import (
    MAX_WRONG_ANSWERS,
    Fault,
    fault_of,
    is_wrong_answer,
)
from swarm_client.routing.find_route import Hop, ModelKey
from swarm_client.routing.watcher import SwarmWatcher
from swarm_client.sent import NotBroughtError
from swarm_client.session_news import SessionNews
from swarm_client.session_route import SessionRoute
from swarm_client.session_streams import SessionStreams, is_nodes_fault
from swarm_client.standby import Standbys
from swarm_client.twins import Twins
from swarm_protocol.errors import (
    CacheFullError,
    InvalidTensorError,
    SessionNotFoundError,
    StreamLostError,
    SwarmError,
)
from swarm_protocol.ids import short_peer
from swarm_protocol.messages import StepReply, WireTensor
from swarm_protocol.tape import TapeBudget
from swarm_protocol.tensors import check_wire_finite
from swarm_protocol.transport.base import Transport
from swarm_protocol.wire_tensor import own_copy

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
        self._watcher = watcher
        self._config = config
        self._batch_size = batch_size
        self.news = SessionNews()
        """Tells what happens to the route."""
        streams = SessionStreams(
            transport, watcher, config, model, batch_size, max_length, prefix_key, self.news.silent
        )
        self._route = SessionRoute(streams, watcher, config, self.news, batch_size, max_length, tapes, transport.now_s)
        self._num_steps = 0
        self._flights: deque[Flight] = deque()
        twins = Twins(transport, self._route, streams, config, max_length)
        self._handovers = Handovers(self._route, twins, self._settle)
        self._standbys = Standbys(self._route, twins)
        self._route.on_new = self._watch
        if config.standby:
            self._route.standby_of = self._standbys.take

    @property
    def route(self) -> Sequence[Hop]:
        """The hops in the order of their blocks; empty until opened."""
        return self._route.hops

    def wire_dtype(self, own: str) -> str:
        """Return the dtype in which hidden states are to be given to `step` that the caller has in `own`."""
        return self._route.wire_dtype(own)

    @property
    def is_whole(self) -> bool:
        """Whether every hop can be given to another node; not if a tape was found not to have fitted anywhere."""
        return self._route.is_whole

    async def open(self, num_tokens: int, prefix: TokenPrefix | None = None) -> int:
        """Find a route and reserve the caches for `num_tokens` tokens and some more.

        Returns how many tokens of `prefix` are cached at every node, where steps may start. Nodes that fail are
        avoided, and another route is tried; blocks that nobody serves are waited for, `ClientConfig.max_wait_s` long.
        Raises what the last try raised: MissingBlocksError, CacheFullError, PeerUnreachableError and the like.
        """
        return await self._route.open(num_tokens, prefix)

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
        waited for, `ClientConfig.max_wait_s` long. Raises SwarmError; which nodes have permuted their rows is not known
        after that.
        """
        async with self._stepping(position, row_order):
            flight = self._take_off(hidden_states, position, row_order)
            if (
                not every_span
                and len(self._route.legs) > 1
                and hidden_states.shape[1]
                and not self._route.has_failed_leg
            ):
                try:
                    return self._landed(flight, await self._fly(flight))
                except SwarmError as error:
                    self._route.check_open()
                    logger.info("going on through the client: %s", error)
            return self._landed(flight, await self._drive(flight))

    async def run(
        self, cut: Callable[[int, int], WireTensor], num_tokens: int, position: int, *, every_span: bool = False
    ) -> list[StepResult]:
        """Run `num_tokens` tokens at `position` in steps that are small enough, and several of them at once.

        `cut(start, end)` gives their states (batch, end - start, hidden). Cancelling and errors are as in `step`.
        """
        self._route.check_open()
        most = max(1, self._config.step_tokens // self._batch_size)
        results: list[StepResult] = []

        def came_back(result: StepResult) -> None:
            results.append(result)
            done = sum(found.outputs[-1].shape[1] for found in results)
            if done < num_tokens:
                self.news.prefilled(position + done, position + num_tokens)

        if len(self._route.legs) > 1 and num_tokens >= FIRST_TOKENS + LEAST_TOKENS and not every_span:
            async with self._stepping(position):
                try:
                    await fly_pieces(
                        lambda start, end: self._take_off(cut(start, end), position + start),
                        self._fly,
                        lambda flight, result: came_back(self._landed(flight, result)),
                        num_tokens,
                        len(self._route.legs),
                        most,
                    )
                except BaseExceptionGroup as problems:
                    if problems.split(SwarmError)[1] is not None:
                        raise
                    self._route.check_open()
                    logger.info("going on through the client: %s", problems.exceptions[0])
                while self._flights:
                    flight = self._flights[0]
                    came_back(self._landed(flight, await self._drive(flight)))
        done = sum(result.outputs[-1].shape[1] for result in results)
        while done < num_tokens or not results:
            end = min(num_tokens, done + most)
            came_back(await self.step(cut(done, end), position + done, every_span=every_span))
            done = end
        return results

    async def close(self) -> None:
        """Free the caches at every node. Idempotent."""
        await self._handovers.close()
        await self._standbys.close()
        self._flights.clear()
        await self._route.close()

    def _watch(self, legs: Sequence[Leg]) -> None:
        self._handovers.watch(legs)
        if self._config.standby:
            self._standbys.watch(legs)

    # the life of a step

    @contextlib.asynccontextmanager
    async def _stepping(self, position: int, row_order: tuple[int, ...] | None = None) -> AsyncIterator[None]:
        async with self._handovers.stepping(position, row_order):
            self._standbys.steps(position, row_order)
            yield
            self._standbys.stepped()

    def _take_off(self, hidden_states: WireTensor, position: int, row_order: tuple[int, ...] | None = None) -> Flight:
        self._route.check_open()
        if not self._flights:
            self.news.advanced()
        self._num_steps += 1
        states = own_copy(hidden_states)  # the caller may change its tensor, the tape is to keep what was sent
        self._route.entered(states, position, row_order)
        flight = Flight(self._num_steps, states, position, row_order)
        self._flights.append(flight)
        return flight

    def _landed(self, flight: Flight, result: StepResult) -> StepResult:
        if self._flights[0] is not flight:
            raise StreamLostError("a piece before this one did not come back")
        self._flights.popleft()
        self.news.advanced()
        self._route.came_back()
        return result

    async def _settle(self) -> None:
        """Complete the steps that were cancelled: nodes may have got them, or get them yet."""
        self._route.check_open()
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
            for leg in self._route.legs:
                sent = lost.sent.get(leg)
                if sent is not None and not sent.has_begun and not may_come:
                    leg.stream.forget(sent)
                elif sent is not None and not sent.is_answered and leg.failure is None:
                    leg.failure = SessionNotFoundError("a step is on its way that is not wanted any more")
                may_come = sent is None or (sent.error is None and (sent.has_begun or may_come))

    async def _fly(self, flight: Flight, turns: Turns | None = None) -> StepResult:
        """Let a step go round; `turns` keep several of them in their order.

        Raises SwarmError if anything is not as it should be; the step is wherever it came to then.
        """
        legs = list(self._route.legs)
        for leg in legs:
            order = leg.order_for(flight.number, flight.row_order)
            flight.sent[leg] = leg.stream.plan(flight.states.shape, flight.states.dtype, flight.position, order)
        links = [self._route.is_direct(first, second) for first, second in itertools.pairwise(legs)]
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
                    self._route.link_failed(legs[index], legs[index + 1])
                    raise NotBroughtError(f"{short_peer(legs[index].peer_id)} does not reach the next node")
        if states.shape != flight.states.shape:
            raise InvalidTensorError(f"the last node answered {states} to {flight.states}")
        check_wire_finite(states)
        for timing in timings:
            self._watcher.stepped(timing.hop, flight.num_tokens, timing.total_s)
        return StepResult((states,), tuple(timings))

    async def _set_out(self, flight: Flight, legs: Sequence[Leg], states: WireTensor) -> None:
        """Give a step to the first of `legs`, to go on through all of them."""
        onward = tuple(leg.stream.onward(flight.sent[leg]) for leg in legs[1:])
        first = legs[0]
        with self._route.losing(first):
            await first.stream.send(flight.sent[first], states, onward, upstream=self._route.upstream(first))

    async def _come_by(self, flight: Flight, legs: Sequence[Leg], index: int, *, is_brought: bool) -> StepReply:
        """Wait until a step is through one of the legs."""
        leg = legs[index]
        try:
            with self._route.losing(leg):
                reply = await leg.stream.reply(flight.sent[leg], is_brought=is_brought)
        except NotBroughtError:
            self._route.link_failed(legs[index - 1], leg)
            raise
        leg.upstream = self._route.upstream(leg)
        return reply

    async def _drive(self, flight: Flight) -> StepResult:
        """Bring a step through all hops one by one, wherever it had come to, and replace the nodes that fail."""
        states, timings = [flight.states], list[HopTiming]()
        num_wrong = 0
        try:
            while (index := len(states) - 1) < len(self._route.legs):
                leg = self._route.legs[index]
                was_here = leg in flight.sent and flight.sent[leg].is_answered
                was_lost = leg.failure is not None
                try:
                    reply, timing = await self._visit(flight, index, states[index])
                except SwarmError as error:
                    self._route.check_open()
                    num_wrong += is_wrong_answer(error) and not was_lost
                    if num_wrong == MAX_WRONG_ANSWERS:
                        raise
                    lost = self._lost_leg(error, index, states[index], flight)
                    lost = await self._route.replace(lost, flight, error)
                    if is_wrong_answer(error):
                        self._distrust(flight, lost)
                    del states[lost + 1 :], timings[lost:]
                else:
                    self._route.check_open()
                    self._watcher.stepped(leg.hop, flight.num_tokens, timing.total_s)
                    if not was_here:
                        self.news.advanced()
                    states.append(reply)
                    timings.append(timing)
        except SwarmError:
            self._give_up(flight)
            raise
        return StepResult(tuple(states[1:]), tuple(timings))

    def _distrust(self, flight: Flight, index: int) -> None:
        """A node before answered wrongly, and may have sent it on: what the legs from `index` on hold is given up."""
        for leg in self._route.legs[index:]:
            sent = flight.sent.get(leg)
            if sent is not None and sent.may_go_on and leg.failure is None:
                leg.failure = SessionNotFoundError("it may have been given wrong states")

    async def _visit(self, flight: Flight, index: int, states: WireTensor) -> tuple[WireTensor, HopTiming]:
        """Return what one node makes of a step. The last one's output is checked: others' the next node sees."""
        leg = self._route.legs[index]
        if leg.failure is not None:
            raise leg.failure.with_traceback(None)
        clock = asyncio.get_running_loop().time
        started_s = clock()
        sent, upstream = flight.sent.get(leg), self._route.upstream(leg)
        if sent is not None and sent.error is not None:
            if sent.row_order or not leg.stream.is_settled:
                raise sent.error
            sent = None
        if sent is None:
            order = leg.order_for(flight.number, flight.row_order)
            sent = flight.sent[leg] = leg.stream.plan(states.shape, states.dtype, flight.position, order)
        try:
            if not sent.is_answered:
                await leg.stream.send(sent, states, upstream=upstream)
            reply = await leg.stream.reply(sent)
        except CacheFullError:
            needed = flight.position + states.shape[1]
            if sent.max_tokens is None or sent.max_tokens <= needed or not leg.stream.is_settled:
                raise
            # There is no room for the reservation that was wished for; what is needed may fit.
            sent = flight.sent[leg] = leg.stream.plan(states.shape, states.dtype, flight.position, sent.row_order)
            sent.max_tokens = needed
            await leg.stream.send(sent, states, upstream=upstream)
            reply = await leg.stream.reply(sent)
        output = await leg.stream.output(sent)
        leg.upstream = upstream
        if leg is self._route.legs[-1]:
            check_wire_finite(output)
        return output, _timing(leg, reply, clock() - started_s)

    def _lost_leg(self, error: SwarmError, index: int, states: WireTensor, flight: Flight) -> int:
        """Return the index of the leg that is to be replaced. Raises `error` if that would not help."""
        fault = fault_of(error, is_first_hop=index == 0, is_input_finite=_is_finite(states))
        if fault is Fault.CALLER:
            raise error
        if flight.row_order is not None:  # whether the node had permuted its rows when it refused is not known
            self._route.lose(self._route.legs[index], error, is_blamed=fault is Fault.NODE)
        return index if fault is Fault.NODE else index - 1


def _timing(leg: Leg, reply: StepReply, total_s: float) -> HopTiming:
    # The client may hear late that a node is done, and then of the next one at once.
    return HopTiming(leg.hop, max(total_s, reply.queue_s + reply.compute_s), reply.queue_s, reply.compute_s)


def _is_finite(states: WireTensor) -> bool:
    try:
        check_wire_finite(states)
    except InvalidTensorError:
        return False
    return True
