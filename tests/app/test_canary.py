"""Test answers are made when nobody waits, in turn, and what is kept of them is how they went."""

import threading

import pytest

from app.canary import FIRST_S, Canary, CanaryTimeoutError, is_due, timed_answer
from app.canary_history import CanaryHistory, CanaryRun
from app.config import StatusConfig
from app.database import IN_MEMORY, Database
from app.generation_queue import GenerationQueue
from app.model_registry import ModelRegistry, ModelSource
from app.swarm_board import SwarmBoard
from swarm_protocol.errors import StreamLostError
from tests.app.fake_swarm import FakeModel
from tests.app.swarms import SWARMS

PERIOD_S = 600.0


@pytest.mark.parametrize(
    ("last_at", "now", "is_busy", "expected"),
    [
        (None, FIRST_S - 1, False, False),
        (None, FIRST_S, False, True),
        (None, FIRST_S, True, False),
        (None, FIRST_S + PERIOD_S, True, True),
        (1000.0, 1000 + PERIOD_S - 1, False, False),
        (1000.0, 1000 + PERIOD_S, False, True),
        (1000.0, 1000 + PERIOD_S, True, False),
        (1000.0, 1000 + 2 * PERIOD_S, True, True),
    ],
)
def test_a_model_is_asked_once_a_period_and_later_while_people_wait(
    last_at: float | None, now: float, is_busy: bool, expected: bool
) -> None:
    assert is_due(last_at, 0.0, now, PERIOD_S, is_busy=is_busy) == expected


class World:
    """A canary on fake models and a clock that is set."""

    def __init__(self, *models: FakeModel) -> None:
        self.now = 1000.0
        registry = ModelRegistry([ModelSource(model.name, lambda model=model: model) for model in models])
        registry.load()
        self.queue = GenerationQueue(4, 4)
        self.history = CanaryHistory(Database(IN_MEMORY))
        board = SwarmBoard(registry, self.queue, "0.1.0", clock=lambda: self.now)
        config = StatusConfig(canary_s=PERIOD_S, canary_tokens=6)
        self.canary = Canary(registry, self.queue, self.history, board.report, config, lambda: self.now)

    def pass_by(self, seconds: float) -> None:
        self.now += seconds
        self.canary.ask_due()

    def runs(self, name: str = "umbel/fake-1b") -> list[CanaryRun]:
        return list(self.history.since(name, 0.0))


def test_answers_are_timed_and_leave_no_session() -> None:
    model = FakeModel(delay_s=0.01, is_endless=True)
    world = World(model)
    world.pass_by(FIRST_S)
    (run,) = world.runs()
    assert (run.outcome, run.min_replicas, run.started_at) == ("ok", 2, 1000.0 + FIRST_S)
    assert run.first_token_s is not None
    assert run.first_token_s >= 0.01
    assert run.tokens_per_s is not None
    assert 0 < run.tokens_per_s <= 100
    assert model.counts.open_sessions == 0
    assert model.counts.generated_tokens == 6
    world.pass_by(PERIOD_S / 2)
    assert len(world.runs()) == 1
    world.pass_by(PERIOD_S / 2)
    assert len(world.runs()) == 2


def test_failures_are_kept_by_their_code() -> None:
    model = FakeModel(error_at=(0, StreamLostError("gone")))
    world = World(model)
    world.pass_by(FIRST_S)
    model.open_error = ZeroDivisionError("a bug")
    world.pass_by(PERIOD_S)
    assert [run.outcome for run in world.runs()] == ["stream_lost", "internal_error"]
    assert all(run.tokens_per_s is None for run in world.runs())


def test_models_known_to_be_incomplete_are_not_asked() -> None:
    model = FakeModel(nodes=SWARMS["incomplete"](), missing=["blocks 20–27"])
    world = World(model)
    world.pass_by(FIRST_S)
    assert [(run.outcome, run.min_replicas) for run in world.runs()] == [("missing_blocks", 0)]
    assert model.counts.opened == 0


def test_every_model_has_its_turn() -> None:
    world = World(FakeModel(name="a/one"), FakeModel(name="b/two"))
    world.pass_by(FIRST_S)
    assert [len(world.runs("a/one")), len(world.runs("b/two"))] == [1, 1]


def test_while_somebody_generates_it_waits() -> None:
    world = World(FakeModel())
    with world.queue.turn(lambda _: None):
        world.pass_by(FIRST_S)
        assert world.runs() == []
    world.pass_by(1.0)
    assert len(world.runs()) == 1


def test_an_answer_that_takes_too_long_is_given_up() -> None:
    model = FakeModel(delay_s=30.0)
    with pytest.raises(CanaryTimeoutError):
        timed_answer(model, 4, timeout_s=0.05)
    assert model.counts.open_sessions == 0


def test_what_the_end_of_the_site_cut_off_is_not_kept() -> None:
    model = FakeModel()
    world = World(model)
    world.now += FIRST_S
    ending = threading.Event()
    model.reply = lambda _: ending.set() or ["one"]  # type: ignore[func-returns-value]
    world.canary.ask_due(ending.is_set)
    assert world.runs() == []


def test_the_thread_asks_and_ends() -> None:
    model = FakeModel()
    world = World(model)
    world.now += FIRST_S
    asked, ending = threading.Event(), threading.Event()
    add = world.history.add
    world.history.add = lambda run: (add(run), asked.set())  # type: ignore[method-assign, assignment]
    world.canary.start(ending.is_set)
    assert asked.wait(30)
    ending.set()
    for thread in threading.enumerate():
        if thread.name == "canary":
            thread.join(30)
            assert not thread.is_alive()
