"""Brings new nodes to where an old one was: they are given again what had gone into it."""

import logging
from collections.abc import Callable, Sequence

from swarm_client.leg import Leg, direct_segments
from swarm_client.sent import NotBroughtError, Sent
from swarm_protocol.errors import InvalidTensorError, SwarmError
from swarm_protocol.ids import short_peer
from swarm_protocol.messages import Onward, WireTensor
from swarm_protocol.tape import Tape
from swarm_protocol.tensors import check_wire_finite

logger = logging.getLogger(__name__)


class SourceLostError(Exception):
    """The node before, which has what is to be given to the new ones, does not send it: `error` says why."""

    def __init__(self, error: SwarmError) -> None:
        super().__init__(str(error))
        self.error = error


class Replay:
    """Plays a tape to the new legs of a session, one behind the other.

    `source` is the leg before them, whose node has the tape; None where the client has it, as `tape`. `is_direct` says
    whether one node may send to another by itself; `on_failed_link` and `on_failed_leg` hear of those that do not.
    """

    def __init__(
        self,
        tape: Tape,
        source: Leg | None,
        legs: Sequence[Leg],
        is_direct: Callable[[Leg, Leg], bool],
        on_failed_link: Callable[[Leg, Leg], None],
        on_failed_leg: Callable[[Leg, SwarmError], None],
    ) -> None:
        self._tape = tape
        self._source = source
        self._legs = legs
        self._is_direct = is_direct
        self._on_failed_link = on_failed_link
        self._on_failed_leg = on_failed_leg

    async def play(self, num_tokens: int, width: int, like: WireTensor, first: int = 0) -> None:
        """Play the first `num_tokens` tokens, or those behind `first`, `width` at once; their values are `like` these.

        Raises SourceLostError, or the SwarmError of a leg that failed.
        """
        for start in range(first, num_tokens, width):
            end = min(num_tokens, start + width)
            shape = (like.shape[0], end - start, like.shape[2])
            await self._play_piece(start, end, shape, like.dtype)

    async def _play_piece(self, start: int, end: int, shape: tuple[int, ...], dtype: str) -> None:
        sent = [leg.stream.plan(shape, dtype, start) for leg in self._legs]
        onward = [leg.stream.onward(one) for leg, one in zip(self._legs, sent, strict=True)]
        links = [self._is_direct(a, b) for a, b in zip(self._legs, self._legs[1:], strict=False)]
        segments = direct_segments(links)
        states: WireTensor | None = self._tape.part(start, end) if self._source is None else None
        if self._source is not None:
            first = segments[0] if self._is_direct(self._source, self._legs[0]) else range(0)
            states = await self._from_source(
                self._source, start, end, shape, dtype, tuple(onward[index] for index in first)
            )
        for segment in segments:
            is_last = segment is segments[-1]
            for index in segment:
                leg = self._legs[index]
                try:
                    if index == segment.start and states is not None:
                        others = tuple(onward[other] for other in segment[1:])
                        await leg.stream.send(sent[index], states, others, wants_output=not is_last)
                    is_brought = index != segment.start or states is None
                    reply = await leg.stream.reply(sent[index], is_brought=is_brought)
                    if index != segment[-1] and reply.hidden_states.shape == shape:
                        raise NotBroughtError(f"{short_peer(leg.peer_id)} does not reach the next node")
                except NotBroughtError:
                    before = self._legs[index - 1] if index else self._source
                    if index != segment[-1] and sent[index].is_answered:
                        self._on_failed_link(leg, self._legs[index + 1])
                    elif before is not None:
                        self._on_failed_link(before, leg)
                    raise
                except SwarmError as error:
                    if not (isinstance(error, InvalidTensorError) and await self._is_fault_before(index, sent, error)):
                        self._on_failed_leg(leg, error)
                    raise
            states = None if is_last else await self._legs[segment[-1]].stream.output(sent[segment[-1]])

    async def _is_fault_before(self, index: int, sent: Sequence[Sent], error: SwarmError) -> bool:
        """Whether a leg refused what the one before it had made, which is not finite; that one is blamed then.

        Raises SourceLostError if it is the source.
        """
        one = sent[index]
        if index:
            before = self._legs[index - 1]
            states = await before.stream.output(sent[index - 1])
        elif self._source is not None:
            end = one.position + one.shape[1]
            states = await self._source.stream.send_tape(one.position, end, one.shape, one.dtype)
        else:
            return False
        try:
            check_wire_finite(states)
        except InvalidTensorError:
            if not index:
                raise SourceLostError(error) from error
            self._on_failed_leg(before, error)
            return True
        return False

    async def _from_source(
        self, source: Leg, start: int, end: int, shape: tuple[int, ...], dtype: str, onward: tuple[Onward, ...]
    ) -> WireTensor | None:
        """Return the states, or None if they have gone on by themselves."""
        try:
            states = await source.stream.send_tape(start, end, shape, dtype, onward)
        except SwarmError as error:
            raise SourceLostError(error) from error
        if onward and states.shape == shape:
            self._on_failed_link(source, self._legs[0])
            raise NotBroughtError(f"{short_peer(source.peer_id)} does not reach {short_peer(self._legs[0].peer_id)}")
        return states if not onward else None
