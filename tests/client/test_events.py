"""Events as people and programs read them, and their way to the listener."""

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from swarm_client.events import Recovered, RouteChanged, RoutePart, SessionEvent, Waiting
from swarm_client.loop_thread import LoopThread
from swarm_client.recovery import Patience, reason_of
from swarm_client.step_runner import MAX_WAITING, StepRunner
from swarm_protocol.errors import (
    CacheFullError,
    CancelledStepError,
    InternalError,
    InvalidTensorError,
    LimitExceededError,
    MissingBlocksError,
    NodeDrainingError,
    PeerUnreachableError,
    SessionClosedError,
    SessionNotFoundError,
    StepTimeoutError,
    StreamLostError,
    SwarmError,
)
from swarm_protocol.ids import PeerId
from swarm_protocol.spans import Span

FIRST, SECOND = RoutePart(Span(0, 12), PeerId("12D3KooWaaaaaa")), RoutePart(Span(12, 16), PeerId("12D3KooWbbbbbb"))
OTHER = RoutePart(Span(12, 16), PeerId("12D3KooWcccccc"))


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (Waiting((Span(12, 16),), "missing_blocks", 1.0, 29.0), "blocks 12–15 have no node; waiting 29 s more"),
        (Waiting((Span(3, 4),), "missing_blocks", 1.0, 29.0), "block 3 has no node; waiting 29 s more"),
        (
            Waiting((Span(3, 4), Span(6, 8)), "missing_blocks", 1.0, None),
            "block 3, blocks 6–7 have no node",
        ),
        (Waiting((Span(12, 16),), "looking", 0.0, 30.0), "looking for another node for blocks 12–15"),
        (Waiting((Span(12, 16),), "no_answer", 0.0, None), "the only node of blocks 12–15 does not answer"),
        (
            Waiting((Span(12, 16),), "cache_full", 0.0, 30.0),
            "no node can take blocks 12–15 now (cache_full); waiting 30 s more",
        ),
        (
            RouteChanged("opened", (), (FIRST, SECOND), (FIRST, SECOND)),
            "the route is blocks 0–11 at …aaaaaa, blocks 12–15 at …bbbbbb",
        ),
        (
            RouteChanged("node_lost", (SECOND,), (OTHER,), (FIRST, OTHER)),
            "blocks 12–15 went elsewhere (node_lost): blocks 12–15 at …cccccc",
        ),
        (Recovered(1.234, 40), "going on after 1.2 s; 40 tokens were computed again"),
    ],
)
def test_sentences_name_blocks_inclusively(event: SessionEvent, message: str) -> None:
    assert event.message == message
    assert event.as_json()["message"] == message


def test_programs_see_half_open_blocks_and_the_ends_of_peer_ids() -> None:
    found = RouteChanged("node_full", (SECOND,), (OTHER,), (FIRST, OTHER)).as_json()
    assert found["reason"] == "node_full"
    assert found["left"] == [{"blocks": "12:16", "peer": "…bbbbbb"}]
    assert found["joined"] == [{"blocks": "12:16", "peer": "…cccccc"}]
    assert [part["blocks"] for part in found["route"]] == ["0:12", "12:16"]
    waiting = Waiting((Span(3, 4),), "missing_blocks", 1.26, 28.74).as_json()
    assert (waiting["blocks"], waiting["waited_s"], waiting["left_s"]) == (["3:4"], 1.3, 28.7)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (StreamLostError("x"), "node_lost"),
        (StepTimeoutError("x"), "node_lost"),
        (PeerUnreachableError("x"), "node_lost"),
        (NodeDrainingError(), "node_leaving"),
        (CacheFullError(2, 1), "node_full"),
        (LimitExceededError("x"), "node_full"),
        (InvalidTensorError("x"), "wrong_answer"),
        (InternalError("x"), "wrong_answer"),
        (SessionClosedError("x"), "session_forgotten"),
        (SessionNotFoundError("x"), "session_forgotten"),
    ],
)
def test_every_way_to_lose_a_node_has_its_reason(error: SwarmError, reason: str) -> None:
    assert reason_of(error) == reason


def test_a_wait_tells_what_is_missing_and_how_long_it_goes_on() -> None:
    patience = Patience(since_s=100.0, max_wait_s=30.0)
    assert patience.waiting([Span(2, 5)], None, 100.0) == Waiting((Span(2, 5),), "looking", 0.0, 30.0)
    missing = MissingBlocksError("m", [Span(3, 4)])
    assert patience.waiting([Span(2, 5)], missing, 112.0) == Waiting((Span(3, 4),), "missing_blocks", 12.0, 18.0)
    assert patience.waiting([Span(2, 5)], CacheFullError(2, 1), 140.0).left_s == 0.0
    assert patience.lasts(130.0)
    assert not patience.lasts(130.1)


# --- the way to the listener


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    found = LoopThread()
    yield found
    found.close()


def note(number: int) -> Recovered:
    return Recovered(0.0, number)


def numbers(events: list[SessionEvent]) -> list[int]:
    return [event.num_tokens for event in events if isinstance(event, Recovered)]


def test_events_are_handed_over_in_order_by_the_thread_that_waits(loop: LoopThread) -> None:
    seen: list[tuple[SessionEvent, threading.Thread]] = []
    runner = StepRunner(loop, lambda event: seen.append((event, threading.current_thread())))

    async def work() -> str:
        for number in range(3):
            runner.put(note(number))
            await asyncio.sleep(0.01)
        runner.put(note(3))
        return "done"

    assert runner.run(work) == "done"
    assert numbers([event for event, _ in seen]) == [0, 1, 2, 3]
    assert {thread for _, thread in seen} == {threading.current_thread()}


def test_an_event_comes_while_nothing_else_does(loop: LoopThread) -> None:
    came = threading.Event()
    runner = StepRunner(loop, lambda event: came.set())

    async def work() -> bool:
        runner.put(note(0))
        return await asyncio.to_thread(came.wait, 5.0)

    assert runner.run(work)


def test_events_before_a_failure_are_told(loop: LoopThread) -> None:
    seen: list[SessionEvent] = []
    runner = StepRunner(loop, seen.append)

    async def work() -> None:
        runner.put(note(1))
        raise StreamLostError("gone")

    with pytest.raises(StreamLostError):
        runner.run(work)
    assert numbers(seen) == [1]


def test_what_a_listener_raises_ends_the_work_and_not_the_loop(loop: LoopThread) -> None:
    class GoneError(Exception):
        pass

    def leave(_: SessionEvent) -> None:
        raise GoneError

    runner = StepRunner(loop, leave)
    cancelled = threading.Event()

    async def work() -> None:
        runner.put(note(0))
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with pytest.raises(GoneError):
        runner.run(work)
    assert cancelled.wait(5.0)
    runner.listener = None

    async def more() -> int:
        return 5

    assert runner.run(more) == 5


def test_a_slow_listener_holds_up_neither_the_loop_nor_memory(loop: LoopThread) -> None:
    seen: list[SessionEvent] = []

    def listen(event: SessionEvent) -> None:
        time.sleep(0.05 if not seen else 0.0)
        seen.append(event)

    runner = StepRunner(loop, listen)

    async def work() -> float:
        started_s = time.perf_counter()
        for number in range(10 * MAX_WAITING):
            runner.put(note(number))
        return time.perf_counter() - started_s

    assert runner.run(work) < 0.05
    assert numbers(seen)[-1] == 10 * MAX_WAITING - 1
    assert len(seen) <= MAX_WAITING + 1


@pytest.mark.parametrize("is_listening", [True, False])
def test_a_cancel_ends_the_wait(loop: LoopThread, is_listening: bool) -> None:
    runner = StepRunner(loop, (lambda event: None) if is_listening else None)

    async def work() -> None:
        await asyncio.sleep(60)

    timer = threading.Timer(0.05, runner.cancel)
    timer.start()
    with runner.cancellable(), pytest.raises(CancelledStepError):
        runner.run(work)
    timer.join()
