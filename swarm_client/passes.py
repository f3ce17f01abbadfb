"""Passes of whole sequences through the swarm, forward and back, without a session. Belongs to the event loop.

A pass keeps what entered each hop. Where a node fails, another one computes its blocks from that, forward or back: what
a node does depends on nothing but its request, so that a failure costs time and never a wrong number.
"""

import asyncio
import contextlib
import itertools
import logging
import secrets
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from swarm_client.config import ClientConfig
from swarm_client.routing.costs import RouteWish
from swarm_client.routing.find_route import Hop, ModelKey, find_throughput_route
from swarm_client.routing.swarm_view import SwarmView
from swarm_client.routing.watcher import SwarmWatcher
from swarm_protocol.errors import (
    LimitExceededError,
    MissingBlocksError,
    ProtocolError,
    StepTimeoutError,
    StreamLostError,
    SwarmError,
    UnexpectedMessageError,
    error_from_wire,
)
from swarm_protocol.ids import PeerId, short_peer
from swarm_protocol.message_stream import MessageStream
from swarm_protocol.messages import (
    COMPUTE_PROTOCOL,
    Backward,
    BackwardReply,
    ErrorReply,
    Forward,
    ForwardReply,
    Message,
    WireTensor,
)
from swarm_protocol.spans import Span, describe_blocks
from swarm_protocol.transport.base import Transport

logger = logging.getLogger(__name__)

T = TypeVar("T")

_random = secrets.SystemRandom()

_LOOK_AGAIN_S = 1.0
"""Between two tries when a pass has failed several times, or blocks are missing."""

_BUSY_S = 0.1
"""Until a node is asked again that has too much to do."""


@dataclass(frozen=True, slots=True)
class Visit:
    """What went through one hop: the states (batch, seq, hidden) that entered its blocks, and those that left."""

    hop: Hop
    entering: WireTensor
    output: WireTensor


class Passes:
    """The passes through one model; streams to nodes are kept between them."""

    def __init__(self, transport: Transport, watcher: SwarmWatcher, config: ClientConfig, model: ModelKey) -> None:
        self._transport = transport
        self._watcher = watcher
        self._config = config
        self._model = model
        self._idle: dict[PeerId, list[MessageStream]] = {}
        self._places = asyncio.Semaphore(config.passes_in_flight)
        self._ids = itertools.count(1)

    async def forward(self, pieces: Sequence[WireTensor], *, is_one_route: bool = False) -> list[list[Visit]]:
        """Run micro-batches (batch, seq, hidden) through all blocks, several at once; return the visits of each.

        With `is_one_route` all take the same nodes, unless one fails. Raises SwarmError.
        """
        whole = Span(0, self._model.num_blocks)
        route = await self._find(whole, _Patience(self._config)) if is_one_route else []
        return await _all([partial(self._forward, states, whole, route) for states in pieces], self._places)

    async def backward(self, passed: Sequence[Sequence[Visit]], gradients: Sequence[WireTensor]) -> list[WireTensor]:
        """Return the gradients of what entered each micro-batch's first hop, for those of its last output.

        Raises SwarmError.
        """
        jobs = [partial(self._backward, visits, found) for visits, found in zip(passed, gradients, strict=True)]
        return await _all(jobs, self._places)

    async def close(self) -> None:
        """End the streams."""
        streams = [stream for idle in self._idle.values() for stream in idle]
        self._idle.clear()
        await asyncio.gather(*(stream.close() for stream in streams))

    async def _forward(self, states: WireTensor, span: Span, route: Sequence[Hop]) -> list[Visit]:
        visits: list[Visit] = []
        patience = _Patience(self._config)
        while not visits or visits[-1].hop.span.end < span.end:
            reached = visits[-1].hop.span.end if visits else span.start
            hops = route if route and not visits else await self._find(Span(reached, span.end), patience)
            route = ()
            for hop in hops:
                entering = visits[-1].output if visits else states
                request = Forward(
                    next(self._ids), self._model.name, self._model.revision, hop.span.start, hop.span.end, entering
                )
                try:
                    reply = await self._ask(hop, request)
                    if not isinstance(reply, ForwardReply) or not _is_like(reply.hidden_states, entering):
                        raise UnexpectedMessageError("the node's answer is not what a forward pass gives")
                except SwarmError as error:
                    await self._failed(hop, error, patience)
                    break
                visits.append(Visit(hop, entering, reply.hidden_states))
        return visits

    async def _backward(self, visits: Sequence[Visit], gradients: WireTensor) -> WireTensor:
        left = list(visits)
        patience = _Patience(self._config)
        while left:
            visit = left[-1]
            span = visit.hop.span
            # The node that ran the blocks forward has them; while it does not fail it is the one to ask.
            has_failed = visit.hop.peer_id in self._watcher.avoided
            hops = [visit.hop] if not has_failed else await self._find(span, patience)
            if len(hops) > 1:  # nobody has all of these blocks any more: what enters the parts has to be found first
                left[-1:] = await self._forward(visit.entering, span, hops)
                continue
            request = Backward(
                next(self._ids), self._model.name, self._model.revision, span.start, span.end, visit.entering, gradients
            )
            try:
                reply = await self._ask(hops[0], request)
                if not isinstance(reply, BackwardReply) or not _is_like(reply.gradients, gradients):
                    raise UnexpectedMessageError("the node's answer is not what a backward pass gives")
            except SwarmError as error:
                await self._failed(hops[0], error, patience)
                continue
            gradients = reply.gradients
            left.pop()
        return gradients

    async def _find(self, span: Span, patience: "_Patience") -> list[Hop]:
        """Return hops for `span`. Blocks that nobody serves are waited for, `ClientConfig.max_wait_s` long."""

        def find(view: SwarmView) -> list[Hop]:
            blocked = self._config.blocked_peers
            wish = RouteWish(avoided=self._watcher.avoided, blocked=blocked, span=span)
            return find_throughput_route(view, self._model, wish, _random.random)

        while True:
            try:
                return await self._watcher.find(find, is_retry=patience.num_failures > 0)
            except MissingBlocksError:
                if patience.is_over:
                    raise
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def _failed(self, hop: Hop, error: SwarmError, patience: "_Patience") -> None:
        """Avoid a node that failed, and wait if that was not the first. Raises `error` if no node would do better."""
        if not (error.retryable or isinstance(error, ProtocolError)):
            raise error
        logger.info("%s at %s: %s", describe_blocks(hop.span), short_peer(hop.peer_id), error)
        if isinstance(error, LimitExceededError):  # it works on what others sent, or on this client's own
            if patience.is_over:
                raise error
            await asyncio.sleep(_BUSY_S)
            return
        self._watcher.failed(hop.peer_id, error)
        patience.num_failures += 1
        if patience.num_failures >= self._config.route_attempts:
            if patience.is_over:
                raise error
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def _ask(self, hop: Hop, request: Forward | Backward) -> Message:
        """Return a node's answer. Raises SwarmError, its own or of the way to it."""
        idle = self._idle.setdefault(hop.peer_id, [])
        try:
            async with asyncio.timeout(self._config.step_s):
                while idle:  # the node ends streams that nobody used for a while
                    with contextlib.suppress(StreamLostError):
                        return await self._exchange(idle.pop(), idle, request)
                return await self._exchange(
                    MessageStream(await self._transport.dial(hop.peer_id, COMPUTE_PROTOCOL)), idle, request
                )
        except TimeoutError:
            raise StepTimeoutError(
                f"{describe_blocks(hop.span)} at {short_peer(hop.peer_id)} took longer than {self._config.step_s:g} s"
            ) from None

    async def _exchange(self, stream: MessageStream, idle: list[MessageStream], request: Forward | Backward) -> Message:
        try:
            await stream.send(request)
            reply = await stream.receive()
            number = reply.step_id if isinstance(reply, ErrorReply) else getattr(reply, "request_id", None)
            if number != request.request_id:
                if isinstance(reply, ErrorReply):
                    raise error_from_wire(reply.code, reply.message, reply.retryable)
                raise UnexpectedMessageError(f"{type(reply).__name__} came, the answer to a pass was expected")
        except BaseException:
            await stream.close()
            raise
        idle.append(stream)
        if isinstance(reply, ErrorReply):
            raise error_from_wire(reply.code, reply.message, reply.retryable)
        return reply


class _Patience:
    """How long one pass is tried."""

    def __init__(self, config: ClientConfig) -> None:
        self._until_s = asyncio.get_running_loop().time() + config.max_wait_s
        self.num_failures = 0

    @property
    def is_over(self) -> bool:
        """Whether it has been tried for long enough."""
        return asyncio.get_running_loop().time() >= self._until_s


def _is_like(found: WireTensor, wanted: WireTensor) -> bool:
    return (found.dtype, found.shape) == (wanted.dtype, wanted.shape)


async def _all(jobs: Sequence[Callable[[], Coroutine[Any, Any, T]]], places: asyncio.Semaphore) -> list[T]:
    """Run the jobs, as many at once as there are places; when one fails the others are given up, and it is raised."""

    async def run(job: Callable[[], Coroutine[Any, Any, T]]) -> T:
        async with places:
            return await job()

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run(job), name="pass") for job in jobs]
    except BaseExceptionGroup as problems:
        raise problems.exceptions[0] from None
    return [task.result() for task in tasks]
