"""The queue of generations: in order, never too many, and nobody stays in it who has left."""

import threading

import pytest

from app.errors import NoCapacityError
from app.generation_queue import GenerationQueue

WAIT_S = 20.0


class Waiter:
    """A thread that takes a turn, and holds it until it is let go."""

    def __init__(self, queue: GenerationQueue) -> None:
        self.positions: list[int] = []
        self.runs, self.told, self.is_to_end, self.leaves = (threading.Event() for _ in range(4))
        self._queue = queue
        self._thread = threading.Thread(target=self._take)
        self._thread.start()
        assert self.told.wait(WAIT_S)

    def _take(self) -> None:
        try:
            with self._queue.turn(self._note):
                self.runs.set()
                assert self.is_to_end.wait(WAIT_S)
        except ConnectionError:
            pass

    def _note(self, position: int) -> None:
        if self.positions[-1:] != [position]:
            self.positions.append(position)
        self.told.set()
        if self.leaves.is_set():
            raise ConnectionError

    def end(self) -> None:
        self.is_to_end.set()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def leave(self) -> None:
        self.leaves.set()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()


def test_turns_come_in_the_order_of_arrival_with_falling_positions():
    queue = GenerationQueue(1, 10)
    waiters = [Waiter(queue) for _ in range(5)]
    for number, waiter in enumerate(waiters):
        assert waiter.runs.wait(WAIT_S)
        assert not any(later.runs.is_set() for later in waiters[number + 1 :])
        assert waiter.positions[0] == number
        assert waiter.positions == sorted(set(waiter.positions), reverse=True)
        waiter.end()
    assert (queue.num_running, queue.num_waiting) == (0, 0)


def test_one_that_leaves_the_queue_lets_those_behind_move_up():
    queue = GenerationQueue(1, 10)
    first, leaving, last = (Waiter(queue) for _ in range(3))
    leaving.leave()
    assert queue.num_waiting == 1
    assert not last.runs.is_set()
    first.end()
    assert last.runs.wait(WAIT_S)
    last.end()
    assert queue.num_running == 0


def test_as_many_run_as_may_and_the_queue_has_an_end():
    queue = GenerationQueue(2, 1)
    waiters = [Waiter(queue) for _ in range(3)]
    assert [waiter.positions for waiter in waiters] == [[0], [0], [1]]
    with pytest.raises(NoCapacityError), queue.turn(lambda position: None):
        pytest.fail("it ran")
    for waiter in waiters:
        waiter.end()
    assert (queue.num_running, queue.num_waiting) == (0, 0)


def test_an_error_inside_gives_the_turn_back():
    queue = GenerationQueue(1, 1)
    with pytest.raises(ZeroDivisionError), queue.turn(lambda position: None):
        raise ZeroDivisionError
    assert queue.num_running == 0
