"""Pure: the state machine of one inference session over one hop; client and node run the same one.

A session is a sequence of steps. Each has an id, 1, 2, 3, …, and says at which position its tokens go. A step is
*begun* when the one side sends it and the other receives it, and *finished* when its reply is sent or received. The
machine keeps four numbers: `position` (tokens cached once every begun step is done), `last_begun`, `last_finished`, and
how many steps may be in flight. It performs no I/O: its owner asks before it acts, and tells what happened.

States

    OPENING    asked for; no step may begin
    OPEN       steps begin and finish
    DETACHED   the client's stream dropped; steps that another node brings begin and finish; waits to be resumed
    CLOSED     over; the cache is free

Rules

    1. What an event does to the state is in `TRANSITIONS`. An event that is not there raises UnexpectedMessageError,
       and nothing has happened.
    2. A step whose id is `last_begun + 1` is new. Its position may be anything from 0 to `position`; below means that
       the cache is rolled back to it first. Behind the end raises PositionError: a hole in the cache is never made.
    3. A step whose id was begun before is a duplicate and changes nothing: while it runs its reply will come by itself;
       once finished, its reply is sent again if it is one of the last `max_in_flight`. Older ones were acknowledged by
       the steps begun since (nobody begins step n before the reply of n - max_in_flight), and raise StepOrderError, as
       does an id from the future.
    4. A step that failed counts as finished with its error as the reply; the position is then the step's own, since
       what lies below it was not touched. Steps begun behind it fail with it.
    5. After a drop each side says the last step it has: the asking side its last finished, the answering side its last
       begun. The answering side sends the replies in between again, the asking side the steps that did not arrive.
       A claim that is outside of what this side knows raises StepOrderError: the session cannot be resumed.
    6. A session in which no step was begun may be filled from another node's: `position` then counts those tokens.
    7. CLOSED is final. Closing again does nothing.
"""

from dataclasses import dataclass
from enum import Enum

from swarm_protocol.errors import MaxLengthError, PositionError, StepOrderError, UnexpectedMessageError


class State(Enum):
    """Where a session is in its life."""

    OPENING = "opening"
    OPEN = "open"
    DETACHED = "detached"
    CLOSED = "closed"


class Event(Enum):
    """What can happen to a session."""

    OPENED = "opened"
    BEGIN_STEP = "begin_step"
    FINISH_STEP = "finish_step"
    DROPPED = "dropped"
    RESUMED = "resumed"
    CLOSED = "closed"


TRANSITIONS: dict[State, dict[Event, State]] = {
    State.OPENING: {
        Event.OPENED: State.OPEN,
        Event.DROPPED: State.CLOSED,
        Event.CLOSED: State.CLOSED,
    },
    State.OPEN: {
        Event.BEGIN_STEP: State.OPEN,
        Event.FINISH_STEP: State.OPEN,
        Event.DROPPED: State.DETACHED,
        Event.RESUMED: State.OPEN,  # the other side saw the stream drop before this one did
        Event.CLOSED: State.CLOSED,
    },
    State.DETACHED: {
        Event.BEGIN_STEP: State.DETACHED,
        Event.FINISH_STEP: State.DETACHED,
        Event.DROPPED: State.DETACHED,
        Event.RESUMED: State.OPEN,
        Event.CLOSED: State.CLOSED,
    },
    State.CLOSED: {
        Event.DROPPED: State.CLOSED,
        Event.CLOSED: State.CLOSED,
    },
}


class Begun(Enum):
    """What `begin_step` found out about a step."""

    NEW = "new"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class _StepRange:
    """Where a begun step starts, for rule 4."""

    step_id: int
    position: int


class SessionState:
    """The state of one session at one side. Not thread-safe: one owner.

    `max_length` is the number of tokens that may be cached, `max_in_flight` how many steps may be begun and unfinished.
    """

    def __init__(self, max_length: int, max_in_flight: int = 1) -> None:
        self.state = State.OPENING
        self.max_length = max_length
        self.max_in_flight = max_in_flight
        self.position = 0
        self.last_begun = 0
        self.last_finished = 0
        self._running: list[_StepRange] = []

    def opened(self, position: int = 0) -> None:
        """The session was granted; `position` tokens are cached already."""
        self._apply(Event.OPENED)
        self.position = position

    def filled(self, position: int) -> None:
        """So many tokens were copied from another node. Raises UnexpectedMessageError once a step was begun."""
        if self.state not in (State.OPEN, State.DETACHED) or self.last_begun:
            raise UnexpectedMessageError("only an open session without any step can be filled from another node's")
        self.position = position

    def extended(self, max_length: int) -> None:
        """From now on `max_length` tokens may be cached, if those are more than before."""
        self.max_length = max(self.max_length, max_length)

    def is_next(self, step_id: int, position: int = 0) -> bool:
        """Whether a step with this id would be new and in order, and leave no hole."""
        return step_id == self.last_begun + 1 and position <= self.position

    def begin_step(self, step_id: int, position: int, num_tokens: int) -> Begun:
        """Begin a step of `num_tokens` tokens per row at `position`, or find that it was begun before (rules 2 and 3).

        Raises UnexpectedMessageError, StepOrderError, PositionError or MaxLengthError, and then nothing has changed.
        """
        self._require(Event.BEGIN_STEP)
        if step_id <= self.last_begun:
            return self._repeated(step_id)
        if not self.is_next(step_id):
            raise StepOrderError(f"step {step_id} came, step {self.last_begun + 1} is next")
        if self.last_begun - self.last_finished >= self.max_in_flight:
            raise StepOrderError(f"step {step_id} came while {self.max_in_flight} are in flight, which is the limit")
        if not 0 <= position <= self.position:
            raise PositionError(position, self.position)
        if position + num_tokens > self.max_length:
            raise MaxLengthError(position, num_tokens, self.max_length)
        self._apply(Event.BEGIN_STEP)
        self.last_begun = step_id
        self.position = position + num_tokens
        self._running.append(_StepRange(step_id, position))
        return Begun.NEW

    def finish_step(self, step_id: int) -> None:
        """The reply of the oldest running step is there. Raises StepOrderError for any other step."""
        self._require(Event.FINISH_STEP)
        self._take_oldest(step_id)
        self._apply(Event.FINISH_STEP)

    def fail_step(self, step_id: int) -> None:
        """The oldest running step failed (rule 4). Raises StepOrderError for any other step."""
        self._require(Event.FINISH_STEP)
        step = self._take_oldest(step_id)
        self._apply(Event.FINISH_STEP)
        self.position = min(self.position, step.position)

    def dropped(self) -> None:
        """The stream ended without a close."""
        self._apply(Event.DROPPED)

    def replies_to_resend(self, last_finished: int) -> range:
        """The other side asks to resume and has every reply up to `last_finished`; return the step ids to answer again.

        Replies of steps that still run follow when they finish. Raises StepOrderError (rule 5).
        """
        self._require(Event.RESUMED)
        oldest = self.last_finished - self.max_in_flight
        if not max(0, oldest) <= last_finished <= self.last_begun:
            raise StepOrderError(
                f"the peer has the replies up to step {last_finished}, this side can go on from {max(0, oldest)} "
                f"to {self.last_begun}"
            )
        self._apply(Event.RESUMED)
        return range(last_finished + 1, self.last_finished + 1)

    def steps_to_resend(self, last_begun: int) -> range:
        """The other side resumed and has every step up to `last_begun`; return the step ids to send again.

        Raises StepOrderError (rule 5).
        """
        self._require(Event.RESUMED)
        if not self.last_finished <= last_begun <= self.last_begun:
            raise StepOrderError(
                f"the peer has the steps up to {last_begun}, this side can go on from {self.last_finished} "
                f"to {self.last_begun}"
            )
        self._apply(Event.RESUMED)
        return range(last_begun + 1, self.last_begun + 1)

    def closed(self) -> None:
        """The session is over on this side."""
        self._apply(Event.CLOSED)

    def _require(self, event: Event) -> State:
        after = TRANSITIONS[self.state].get(event)
        if after is None:
            raise UnexpectedMessageError(f"{event.value} is not possible while the session is {self.state.value}")
        return after

    def _apply(self, event: Event) -> None:
        self.state = self._require(event)

    def _repeated(self, step_id: int) -> Begun:
        if step_id > self.last_finished:
            return Begun.RUNNING
        if step_id > self.last_finished - self.max_in_flight:
            return Begun.FINISHED
        raise StepOrderError(f"step {step_id} was answered long ago; step {self.last_begun + 1} is next")

    def _take_oldest(self, step_id: int) -> _StepRange:
        if not self._running or self._running[0].step_id != step_id:
            raise StepOrderError(f"a reply for step {step_id} is not expected")
        self.last_finished = step_id
        return self._running.pop(0)
