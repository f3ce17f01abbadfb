"""A session over a whole route: hops in a row, opened together. Belongs to the event loop.

What goes into each hop is kept on a tape. When a node dies, freezes, leaves, runs full or answers wrongly, its blocks
are given to other nodes, one or several, which are played the tape; all others keep their caches, and the step goes on.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from functools import partial

from swarm_client.config import ClientConfig
from swarm_client.leg import HopTiming, Leg, StepResult, own_copy
from swarm_client.pipeline import FIRST_TOKENS, LEAST_TOKENS, run_pieces
from swarm_client.prefix_hashes import TokenPrefix, page_hashes
from swarm_client.prompt_pages import PromptPages
from swarm_client.recovery import MAX_WRONG_ANSWERS, Fault, fault_of, has_forgotten, is_wrong_answer, stays_usable
from swarm_client.routing.costs import RouteWish
from swarm_client.routing.find_route import Hop, ModelKey, find_route
from swarm_client.routing.swarm_view import SwarmView
from swarm_client.routing.watcher import SwarmWatcher
from swarm_client.span_stream import HopLimits, SpanStream, tokens_to_reserve
from swarm_client.tape import Tape, TapeBudget
from swarm_protocol.errors import (
    CacheFullError,
    InvalidTensorError,
    MissingBlocksError,
    ProtocolError,
    SessionClosedError,
    SwarmError,
)
from swarm_protocol.ids import ID_BYTES, PeerId, short_id, short_peer
from swarm_protocol.messages import WireTensor
from swarm_protocol.records import NodeRecord
from swarm_protocol.tensors import check_finite, from_wire
from swarm_protocol.transport.base import Transport

logger = logging.getLogger(__name__)

LOOK_AGAIN_S = 1.0
"""Between two looks for nodes that could take over blocks that nobody serves."""


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
        self._model = model
        self._batch_size = batch_size
        self._max_length = max_length
        self._prefix_key = prefix_key
        self._tapes = tapes
        self._limits = HopLimits(config.open_s, config.step_s, config.resume_s, config.reserve_tokens)
        self._legs: list[Leg] = []
        self._num_steps = 0
        self._prompt = PromptPages(tapes, ())
        self._failed_s: dict[PeerId, float] = {}
        """When a node failed this session, on the swarm's clock: it is not asked again before it says that it lives."""
        self._endings: set[asyncio.Task[None]] = set()

    @property
    def route(self) -> Sequence[Hop]:
        """The hops in the order of their blocks; empty until opened."""
        return [leg.hop for leg in self._legs]

    @property
    def is_whole(self) -> bool:
        """Whether every hop can be given to another node; not if the tapes did not fit into their budget."""
        return all(leg.tape.is_whole for leg in self._legs)

    async def open(self, num_tokens: int, prefix: TokenPrefix | None = None) -> int:
        """Find a route and reserve the caches for `num_tokens` tokens and some more.

        Returns how many tokens of `prefix` are cached at every node, where steps may start. Nodes that fail are
        avoided, and another route is tried. Raises what the last try raised: MissingBlocksError, CacheFullError,
        PeerUnreachableError and the like.
        """
        reserved = tokens_to_reserve(num_tokens, self._config.reserve_tokens, self._max_length)
        pages = self._hashes((), prefix)
        for attempt in range(1, self._config.route_attempts + 1):
            hops = await self._find_route(reserved, pages, is_retry=attempt > 1)
            try:
                streams, cached = await self._open_streams(hops, reserved, prefix)
            except SwarmError as error:
                if not _is_nodes_fault(error) or attempt == self._config.route_attempts:
                    raise
                if isinstance(error, CacheFullError):
                    reserved = num_tokens  # what is needed now may still fit
                logger.info("route failed, trying another (%s): %s", attempt, error)
                continue
            self._watcher.holders.remember(pages, [hop.peer_id for hop in hops])
            self._legs = [Leg(stream, Tape(self._tapes)) for stream in streams]
            hashes = [self._hashes(hops[: number + 1], prefix) for number in range(len(hops))]
            self._prompt = PromptPages(self._tapes, hashes)
            return self._prompt.begin([leg.tape for leg in self._legs], cached)
        raise AssertionError("unreachable")

    async def step(
        self, hidden_states: WireTensor, position: int, row_order: tuple[int, ...] | None = None
    ) -> StepResult:
        """Run `hidden_states` (batch, seq, hidden) through all hops at `position`, as `messages.Step` says.

        Cancelling loses nothing: the next step may go on at any position that was cached before. Blocks whose node
        fails are given to others; where there are none, they are waited for, `ClientConfig.max_wait_s` long. Raises
        SwarmError.
        """
        self._check_open()
        self._num_steps += 1
        states = [own_copy(hidden_states)]
        timings: list[HopTiming] = []
        num_wrong = 0
        while (index := len(states) - 1) < len(self._legs):
            leg = self._legs[index]
            order = leg.begin(self._num_steps, states[index], position, row_order)
            try:
                reply, timing = await leg.step(states[index], position, order, is_last=leg is self._legs[-1])
            except SwarmError as error:
                self._check_open()
                lost = self._lost_leg(error, index, states, order is not None)
                num_wrong += is_wrong_answer(error)
                if num_wrong == MAX_WRONG_ANSWERS:
                    raise
                await self._replace(lost, position, error)
                del states[lost + 1 :], timings[lost:]
            else:
                self._check_open()
                num_tokens = states[index].shape[0] * states[index].shape[1]
                self._watcher.stepped(leg.hop, num_tokens, timing.total_s)
                states.append(reply)
                timings.append(timing)
        self._prompt.keep([leg.tape for leg in self._legs], position)
        return StepResult(tuple(states[1:]), tuple(timings))

    async def run(self, cut: Callable[[int, int], WireTensor], num_tokens: int, position: int) -> list[StepResult]:
        """Run `num_tokens` tokens at `position` in steps that are small enough, and several of them at once.

        `cut(start, end)` gives their states (batch, end - start, hidden). Cancelling and errors are as in `step`.
        """
        self._check_open()
        most = max(1, self._config.step_tokens // self._batch_size)
        if len(self._legs) > 1 and num_tokens >= FIRST_TOKENS + LEAST_TOKENS:
            self._num_steps += 1
            try:
                results = await run_pieces(list(self._legs), self._num_steps, cut, num_tokens, position, most)
            except BaseExceptionGroup as problems:
                if problems.split(SwarmError)[1] is not None:
                    raise
                logger.info("beginning again, a piece at a time: %s", problems.exceptions[0])
            else:
                self._prompt.keep([leg.tape for leg in self._legs], position)
                return results
        pieces = [(start, min(num_tokens, start + most)) for start in range(0, num_tokens, most)]
        return [await self.step(cut(start, end), position + start) for start, end in pieces]

    async def close(self) -> None:
        """Free the caches at every node. Idempotent."""
        legs, self._legs = self._legs, []
        for leg in legs:
            leg.tape.drop()
        for ending in self._endings:
            ending.cancel()
        await asyncio.gather(*(leg.stream.close() for leg in legs), *self._endings, return_exceptions=True)

    def _check_open(self) -> None:
        if not self._legs:
            raise SessionClosedError("the session is closed; open a new one")

    def _lost_leg(self, error: SwarmError, index: int, states: Sequence[WireTensor], has_reordered: bool) -> int:
        """Return the index of the leg that is to be replaced. Raises `error` if that would not help."""
        fault = fault_of(error, is_first_hop=index == 0, is_input_finite=_is_finite(states[index]))
        if fault is Fault.CALLER:
            raise error
        if fault is Fault.NODE:
            return index
        if has_reordered:  # whether the node had permuted its rows when it refused the step is not known
            self._lose(self._legs[index], error)
        return index - 1

    # recovery

    async def _replace(self, index: int, position: int, error: SwarmError) -> None:
        """Give the blocks of leg `index` to other nodes, which compute again what is on its tape below `position`.

        Raises `error`, or why no other node could do it.
        """
        leg = self._legs[index]
        if not stays_usable(error):
            self._lose(leg, error)
        if not leg.tape.is_whole:
            raise error
        logger.info("looking for other nodes for %s: %s", leg.hop.span, error)
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + self._config.max_wait_s
        while True:
            try:
                found = await self._other_legs(leg, position)
                break
            except SwarmError as problem:
                is_waited_for = leg.failure is not None and not is_wrong_answer(error)
                if isinstance(problem, MissingBlocksError) and not is_waited_for:
                    raise error from problem
                if loop.time() + LOOK_AGAIN_S > give_up_s or not _is_nodes_fault(problem):
                    raise
                logger.info("still looking: %s", problem)
            await asyncio.sleep(LOOK_AGAIN_S)
            self._check_open()
        if not self._legs:  # closed meanwhile
            for new in found:
                self._end(new.stream)
        self._check_open()
        self._legs[index : index + 1] = found
        self._prompt = PromptPages(self._tapes, ())  # the hashes were those of other hops
        self._end(leg.stream)
        route = " → ".join(f"{short_peer(new.hop.peer_id)}[{new.hop.span}]" for new in found)
        logger.info("recovered %d tokens of %s at %s", position, leg.hop.span, route)

    async def _other_legs(self, leg: Leg, position: int) -> list[Leg]:
        """Return legs for the blocks of `leg` at other nodes, at `position`; the first has its tape."""
        needed = max(position, leg.tape.length)
        reserved = tokens_to_reserve(needed, self._config.reserve_tokens, self._max_length)
        hops = await self._find_route(reserved, leg=leg)  # for its blocks alone
        streams, _ = await self._open_streams(hops, reserved)
        legs = [Leg(stream, Tape(self._tapes), self._num_steps) for stream in streams]
        try:
            await self._play(leg.tape, legs, position)
        except BaseException:
            for failed in legs:
                failed.tape.drop()
                self._end(failed.stream)
            raise
        legs[0].tape.drop()
        legs[0].tape = leg.tape
        return legs

    async def _play(self, tape: Tape, legs: Sequence[Leg], position: int) -> None:
        """Bring new legs to `position`. Raises SwarmError; the node at fault is avoided then."""
        width = max(1, self._config.step_tokens // self._batch_size)
        for start, states in tape.chunks(position, width):
            for leg in legs:
                if leg is not legs[0]:
                    leg.tape.write(start, states)
                try:
                    states = (await leg.stream.step(states, start)).hidden_states
                    check_finite(from_wire(states))
                except SwarmError as error:
                    if _is_nodes_fault(error):
                        self._blame(leg.hop.peer_id, error)
                    raise

    def _lose(self, leg: Leg, error: SwarmError) -> None:
        """The node of `leg` has failed; what it held is given up."""
        if leg.failure is None:
            leg.failure = error
            if not has_forgotten(error):
                self._blame(leg.hop.peer_id, error)

    def _blame(self, peer_id: PeerId, error: SwarmError) -> None:
        self._failed_s[peer_id] = self._transport.now_s()
        self._watcher.failed(peer_id, error)

    def _may_serve(self, record: NodeRecord, leg: Leg) -> bool:
        """Whether a node may take over from `leg`: not its own node while it only refuses, and none that is dead."""
        peer_id = PeerId(record.peer_id)
        if leg.failure is None and peer_id == leg.hop.peer_id:
            return False
        return record.published_s > self._failed_s.get(peer_id, float("-inf"))

    async def _is_replaceable(self, hop: Hop) -> bool:
        """Whether other nodes, none of which failed lately, serve the blocks of `hop`."""
        away = {hop.peer_id, *self._watcher.avoided, *self._config.blocked_peers}
        try:
            find_route(await self._watcher.view(), self._model, RouteWish(blocked=away, span=hop.span), secrets.choice)
        except SwarmError:
            return False
        return True

    def _end(self, stream: SpanStream) -> None:
        """Close a stream without waiting for it: its node may be gone."""
        ending = asyncio.create_task(stream.close(), name="stream-end")
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)

    # routes

    async def _find_route(
        self, reserved: int, pages: Sequence[bytes] = (), leg: Leg | None = None, *, is_retry: bool = False
    ) -> list[Hop]:
        def find(view: SwarmView) -> list[Hop]:
            unfit = {PeerId(r.peer_id) for r in view.records if leg is not None and not self._may_serve(r, leg)}
            wish = RouteWish(
                self._batch_size * reserved, self._watcher.avoided, unfit | self._config.blocked_peers,
                self._watcher.holders.affinity(pages), span=None if leg is None else leg.hop.span,
            )  # fmt: skip
            return find_route(view, self._model, wish, secrets.choice)

        return await self._watcher.find(find, is_retry=is_retry)

    async def _open_streams(
        self, hops: Sequence[Hop], reserved: int, prefix: TokenPrefix | None = None
    ) -> tuple[list[SpanStream], int]:
        """Open a session at every hop; return the streams, and how many tokens of `prefix` all of them have."""
        session_id = secrets.token_bytes(ID_BYTES)
        streams = [
            SpanStream(
                self._transport, hop, session_id, self._max_length, self._limits, partial(self._is_replaceable, hop)
            )
            for hop in hops
        ]
        try:
            results = await asyncio.gather(
                *(
                    stream.open(self._model, self._batch_size, reserved, self._hashes(hops[: number + 1], prefix))
                    for number, stream in enumerate(streams)
                ),
                return_exceptions=True,
            )
        except asyncio.CancelledError:
            await asyncio.gather(*(stream.close() for stream in streams))
            raise
        failures = [(s, r) for s, r in zip(streams, results, strict=True) if isinstance(r, BaseException)]
        if not failures:
            route = " → ".join(f"{short_peer(hop.peer_id)}[{hop.span}]" for hop in hops)
            cached = min(result for result in results if isinstance(result, int))
            logger.info("session opened, %d tokens cached: %s session=%s", cached, route, short_id(session_id))
            return streams, cached
        for stream, error in failures:
            if isinstance(error, SwarmError) and _is_nodes_fault(error):
                self._blame(stream.hop.peer_id, error)
        await asyncio.gather(*(stream.close() for stream in streams))
        raise failures[0][1]

    def _hashes(self, hops: Sequence[Hop], prefix: TokenPrefix | None) -> tuple[bytes, ...]:
        return page_hashes(self._prefix_key, self._model, hops, prefix) if prefix is not None else ()


def _is_nodes_fault(error: SwarmError) -> bool:
    """Whether another node may do better: it refused for now, failed, or does not keep to the protocol."""
    return error.retryable or isinstance(error, ProtocolError)


def _is_finite(states: WireTensor) -> bool:
    try:
        check_finite(from_wire(states))
    except InvalidTensorError:
        return False
    return True
