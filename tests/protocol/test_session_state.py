"""The session's state machine: its table, its rules, and two machines that must agree over a lossy stream."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from swarm_protocol.errors import MaxLengthError, PositionError, StepOrderError, SwarmError, UnexpectedMessageError
from swarm_protocol.session_state import TRANSITIONS, Begun, Event, SessionState, State


def open_state(max_length: int = 100, max_in_flight: int = 1) -> SessionState:
    state = SessionState(max_length, max_in_flight)
    state.opened()
    return state


def snapshot(state: SessionState) -> tuple[State, int, int, int]:
    return state.state, state.position, state.last_begun, state.last_finished


ACTIONS = {
    Event.OPENED: lambda s: s.opened(),
    Event.BEGIN_STEP: lambda s: s.begin_step(1, 0, 1),
    Event.FINISH_STEP: lambda s: s.finish_step(s.last_begun),
    Event.DROPPED: lambda s: s.dropped(),
    Event.RESUMED: lambda s: s.replies_to_resend(0),
    Event.CLOSED: lambda s: s.closed(),
}


@pytest.mark.parametrize(("start", "event"), list(itertools.product(State, Event)))
def test_every_event_in_every_state_does_what_the_table_says(start: State, event: Event) -> None:
    state = SessionState(100)
    if start is not State.OPENING:
        state.opened()
        if event is Event.FINISH_STEP:
            state.begin_step(1, 0, 1)
    if start is State.DETACHED:
        state.dropped()
    if start is State.CLOSED:
        state.closed()
    before = snapshot(state)
    assert before[0] is start
    after = TRANSITIONS[start].get(event)
    if after is None:
        with pytest.raises(UnexpectedMessageError):
            ACTIONS[event](state)
        assert snapshot(state) == before
    else:
        ACTIONS[event](state)
        assert state.state is after


def test_steps_move_the_position() -> None:
    state = open_state()
    assert state.begin_step(1, 0, 5) is Begun.NEW
    state.finish_step(1)
    assert state.begin_step(2, 5, 1) is Begun.NEW
    assert state.position == 6


def test_a_lower_position_rolls_back_and_zero_tokens_do_only_that() -> None:
    state = open_state()
    state.begin_step(1, 0, 8)
    state.finish_step(1)
    assert state.begin_step(2, 3, 0) is Begun.NEW
    state.finish_step(2)
    assert state.position == 3


@pytest.mark.parametrize(
    ("step_id", "position", "num_tokens", "error"),
    [
        (3, 5, 1, StepOrderError),
        (2, 6, 1, PositionError),
        (2, -1, 1, PositionError),
        (2, 5, 96, MaxLengthError),
        (2, 0, 101, MaxLengthError),
    ],
)
def test_an_illegal_step_raises_and_nothing_happens(
    step_id: int, position: int, num_tokens: int, error: type[SwarmError]
) -> None:
    state = open_state()
    state.begin_step(1, 0, 5)
    state.finish_step(1)
    before = snapshot(state)
    with pytest.raises(error):
        state.begin_step(step_id, position, num_tokens)
    assert snapshot(state) == before


def test_a_full_cache_can_still_be_rolled_back() -> None:
    state = open_state(max_length=10)
    state.begin_step(1, 0, 10)
    state.finish_step(1)
    with pytest.raises(MaxLengthError):
        state.begin_step(2, 10, 1)
    assert state.begin_step(2, 9, 1) is Begun.NEW


def test_a_duplicate_changes_nothing() -> None:
    state = open_state()
    state.begin_step(1, 0, 5)
    assert state.begin_step(1, 0, 5) is Begun.RUNNING
    state.finish_step(1)
    assert state.begin_step(1, 0, 5) is Begun.FINISHED
    assert state.position == 5
    state.begin_step(2, 5, 1)
    state.finish_step(2)
    with pytest.raises(StepOrderError):
        state.begin_step(1, 0, 5)


def test_no_more_steps_are_in_flight_than_allowed() -> None:
    state = open_state(max_in_flight=2)
    state.begin_step(1, 0, 1)
    state.begin_step(2, 1, 1)
    with pytest.raises(StepOrderError):
        state.begin_step(3, 2, 1)
    with pytest.raises(StepOrderError):
        state.finish_step(2)
    state.finish_step(1)
    assert state.begin_step(3, 2, 1) is Begun.NEW


def test_a_failed_step_gives_its_position_back() -> None:
    state = open_state()
    state.begin_step(1, 0, 5)
    state.finish_step(1)
    state.begin_step(2, 3, 4)
    state.fail_step(2)
    assert (state.position, state.last_finished) == (3, 2)
    assert state.begin_step(3, 3, 1) is Begun.NEW


@pytest.mark.parametrize(
    ("peer_has", "again"),
    [(2, []), (1, [2]), (3, StepOrderError), (0, StepOrderError)],
)
def test_replies_that_the_peer_misses_are_sent_again(peer_has: int, again: list[int] | type[SwarmError]) -> None:
    state = open_state()
    for step_id in (1, 2):
        state.begin_step(step_id, state.position, 2)
        state.finish_step(step_id)
    state.dropped()
    if isinstance(again, list):
        assert list(state.replies_to_resend(peer_has)) == again
        assert state.state is State.OPEN
    else:
        with pytest.raises(again):
            state.replies_to_resend(peer_has)
        assert state.state is State.DETACHED


def test_a_step_finishing_while_detached_is_answered_after_the_resume() -> None:
    state = open_state()
    state.begin_step(1, 0, 3)
    state.dropped()
    state.finish_step(1)
    assert list(state.replies_to_resend(0)) == [1]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-2, 12), st.integers(0, 12)), max_size=30))
def test_no_sequence_of_steps_makes_a_hole_or_exceeds_the_length(steps: list[tuple[int, int, int]]) -> None:
    state = open_state(max_length=10, max_in_flight=2)
    cached = 0
    for step_id, position, num_tokens in steps:
        before = snapshot(state)
        try:
            begun = state.begin_step(step_id, position, num_tokens)
        except SwarmError:
            assert snapshot(state) == before
            continue
        if begun is Begun.NEW:
            assert position <= cached
            cached = position + num_tokens
            state.finish_step(step_id)
        assert state.position == cached <= 10


class OverALossyStream(RuleBasedStateMachine):
    """A client's and a node's machine; frames are lost whenever the stream drops. Both must end up alike."""

    def __init__(self) -> None:
        super().__init__()
        self.client, self.node = open_state(40, 3), open_state(40, 3)
        self.to_node: list[tuple[int, int, int]] = []
        self.to_client: list[int] = []
        self.sent: dict[int, tuple[int, int, int]] = {}
        self.computed: list[int] = []
        self.connected = True

    @precondition(lambda self: self.connected and self.client.last_begun - self.client.last_finished < 3)
    @rule(back=st.integers(0, 5), num_tokens=st.integers(0, 3))
    def send_step(self, back: int, num_tokens: int) -> None:
        position = max(0, self.client.position - back)
        if position + num_tokens > 40:
            return
        step = (self.client.last_begun + 1, position, num_tokens)
        assert self.client.begin_step(*step) is Begun.NEW
        self.sent[step[0]] = step
        self.to_node.append(step)

    @precondition(lambda self: self.connected and self.to_node)
    @rule()
    def arrive(self) -> None:
        step = self.to_node.pop(0)
        assert self.node.begin_step(*step) is Begun.NEW

    @precondition(lambda self: self.node.last_finished < self.node.last_begun)
    @rule()
    def compute(self) -> None:
        step_id = self.node.last_finished + 1
        self.node.finish_step(step_id)
        self.computed.append(step_id)
        if self.connected:
            self.to_client.append(step_id)

    @precondition(lambda self: self.connected and self.to_client)
    @rule()
    def reply_arrives(self) -> None:
        self.client.finish_step(self.to_client.pop(0))

    @precondition(lambda self: self.connected)
    @rule()
    def drop(self) -> None:
        self.client.dropped()
        self.node.dropped()
        self.to_node, self.to_client, self.connected = [], [], False

    @precondition(lambda self: not self.connected)
    @rule()
    def resume(self) -> None:
        last_begun = self.node.last_begun
        self.to_client = list(self.node.replies_to_resend(self.client.last_finished))
        self.to_node = [self.sent[step_id] for step_id in self.client.steps_to_resend(last_begun)]
        self.connected = True

    @invariant()
    def steps_are_computed_once_and_in_order(self) -> None:
        assert self.computed == list(range(1, len(self.computed) + 1))
        assert self.client.last_finished <= self.node.last_finished <= self.node.last_begun <= self.client.last_begun
        if self.node.last_begun == self.client.last_begun:
            assert self.node.position == self.client.position


TestOverALossyStream = OverALossyStream.TestCase
