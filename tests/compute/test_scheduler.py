"""Who runs next on the device: tables of single decisions, and rules that hold for any traffic."""

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server_node.compute.scheduler import Batch, BatchLimits, Kind, Scheduler, Waiting

LIMITS = BatchLimits(chunk_tokens=8, max_rows=4, max_padded_tokens=100, forward_every=3)


def decode(arrival: int, session: int | None = None, **fields: object) -> Waiting:
    return Waiting(arrival, Kind.DECODE, session or arrival, **fields)  # type: ignore[arg-type]


def prefill(arrival: int, num_tokens: int = 20, **fields: object) -> Waiting:
    return Waiting(arrival, Kind.PREFILL, arrival, num_tokens=num_tokens, **fields)  # type: ignore[arg-type]


def forward(arrival: int, num_tokens: int = 20, **fields: object) -> Waiting:
    return Waiting(arrival, Kind.FORWARD, num_tokens=num_tokens, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("waiting", "wanted"),
    [
        ([], None),
        ([prefill(1), decode(2), Waiting(3, Kind.ALLOCATE)], Batch(Kind.ALLOCATE, (3,))),
        ([decode(1), decode(2), decode(3)], Batch(Kind.DECODE, (1, 2, 3))),
        # groups: the oldest chooses
        ([decode(1, group="a"), decode(2, group="b"), decode(3, group="a")], Batch(Kind.DECODE, (1, 3))),
        # a session's second step waits for its first
        ([decode(1, 7), decode(2, 7), decode(3, 8)], Batch(Kind.DECODE, (1, 3))),
        ([replace(prefill(1), session=7), decode(2, 7)], Batch(Kind.PREFILL, (1,), 8)),
        # rows: those that do not fit are passed over, and one that never fits runs by itself
        ([decode(1, num_rows=2), decode(2, num_rows=3), decode(3, num_rows=2)], Batch(Kind.DECODE, (1, 3))),
        ([decode(1, num_rows=9), decode(2)], Batch(Kind.DECODE, (1,))),
        # padding: three rows as long as the longest one would be too much
        ([decode(1, position=5), decode(2, position=45), decode(3, position=6)], Batch(Kind.DECODE, (1, 2))),
        ([decode(1, position=999), decode(2)], Batch(Kind.DECODE, (1,))),
        # pieces
        ([prefill(1, 20)], Batch(Kind.PREFILL, (1,), 8)),
        ([prefill(1, 5)], Batch(Kind.PREFILL, (1,), 5)),
        ([prefill(1, 20, num_rows=3)], Batch(Kind.PREFILL, (1,), 2)),
        ([prefill(1, 20, num_rows=99)], Batch(Kind.PREFILL, (1,), 1)),
        ([forward(1), prefill(2), prefill(3)], Batch(Kind.PREFILL, (2,), 8)),
        ([forward(1, 4, num_blocks=5), forward(2)], Batch(Kind.FORWARD, (1,), 5)),
        ([forward(1, 16, num_blocks=5)], Batch(Kind.FORWARD, (1,), 2)),
        ([forward(1, 4000, num_blocks=5)], Batch(Kind.FORWARD, (1,), 1)),
        ([forward(1, 0, num_blocks=5)], Batch(Kind.FORWARD, (1,), 5)),
        # no piece has run, so nobody waited for one yet: a decode step comes after at most one
        ([prefill(1), decode(2)], Batch(Kind.PREFILL, (1,), 8)),
    ],
)
def test_a_decision(waiting: list[Waiting], wanted: Batch | None) -> None:
    assert Scheduler(LIMITS).next_batch(waiting) == wanted


def test_decode_steps_and_pieces_alternate() -> None:
    scheduler = Scheduler(LIMITS)
    kinds = []
    for turn in range(6):
        # A session that comes back at once, and a prefill that never ends.
        batch = scheduler.next_batch([prefill(1), decode(2 + turn, 2)])
        assert batch is not None
        kinds.append(batch.kind)
    assert kinds == [Kind.PREFILL, Kind.DECODE] * 3


def test_all_who_waited_for_a_piece_run_before_the_next_one() -> None:
    scheduler = Scheduler(LIMITS)
    waiting = [prefill(1), *(decode(arrival, num_rows=2) for arrival in range(2, 8))]
    served = []
    for _ in range(5):
        batch = scheduler.next_batch(waiting)
        assert batch is not None
        served.append(batch.arrivals)
        waiting = [work for work in waiting if work.kind is Kind.PREFILL or work.arrival not in batch.arrivals]
    assert served == [(1,), (2, 3), (4, 5), (6, 7), (1,)]


def test_forwards_get_a_share_of_the_pieces() -> None:
    scheduler = Scheduler(LIMITS)
    batches = [scheduler.next_batch([forward(1), prefill(2)]) for _ in range(6)]
    assert [batch.arrivals[0] for batch in batches if batch] == [2, 2, 1, 2, 2, 1]


@dataclass
class Simulation:
    """Traffic against a scheduler. Every turn some work arrives and one batch runs."""

    scheduler: Scheduler = field(default_factory=lambda: Scheduler(LIMITS))
    waiting: dict[int, Waiting] = field(default_factory=dict)
    pieces_waited: dict[int, int] = field(default_factory=dict)
    started: dict[Kind, list[int]] = field(default_factory=lambda: {kind: [] for kind in Kind})
    num_arrived: int = 0

    def arrive(self, work: Waiting) -> None:
        self.num_arrived += 1
        self.waiting[self.num_arrived] = replace(work, arrival=self.num_arrived)
        self.pieces_waited[self.num_arrived] = 0

    def turn(self) -> Batch | None:
        batch = self.scheduler.next_batch(list(self.waiting.values()))
        if batch is None:
            return None
        chosen = [self.waiting[arrival] for arrival in batch.arrivals]
        self._check_limits(batch, chosen)
        for work in chosen:
            if work.arrival not in self.started[work.kind]:
                self.started[work.kind].append(work.arrival)
            self._progress(work, batch)
        for arrival, work in self.waiting.items():
            older = (other for other in self.waiting.values() if other.arrival < arrival)
            is_blocked = work.session is not None and any(other.session == work.session for other in older)
            if batch.amount and work.kind is Kind.DECODE and not is_blocked:
                self.pieces_waited[arrival] += 1
        assert all(waited <= 1 for waited in self.pieces_waited.values())
        return batch

    def _check_limits(self, batch: Batch, chosen: list[Waiting]) -> None:
        assert {work.kind for work in chosen} == {batch.kind}
        assert len({work.group for work in chosen}) == 1
        if batch.kind is not Kind.DECODE:
            assert len(chosen) == 1
        elif len(chosen) > 1:
            num_rows = sum(work.num_rows for work in chosen)
            assert num_rows <= LIMITS.max_rows
            assert num_rows * max(work.position + work.num_tokens for work in chosen) <= LIMITS.max_padded_tokens
            assert len({work.session for work in chosen}) == len(chosen)
        if batch.kind is Kind.PREFILL:
            assert batch.amount == 1 or batch.amount * chosen[0].num_rows <= LIMITS.chunk_tokens
        # Nobody of the same kind who could run is older than the oldest of the batch.
        older = [
            work for work in self.waiting.values() if work.kind is batch.kind and work.arrival < min(batch.arrivals)
        ]
        first_of = {work.session: work.arrival for work in reversed(self.waiting.values()) if work.session is not None}
        assert all(work.session is not None and first_of[work.session] < work.arrival for work in older)

    def _progress(self, work: Waiting, batch: Batch) -> None:
        if work.kind is Kind.PREFILL:
            left = replace(work, num_tokens=work.num_tokens - batch.amount)
            is_done = not left.num_tokens
        elif work.kind is Kind.FORWARD:
            left = replace(work, num_blocks=work.num_blocks - batch.amount)
            is_done = not left.num_blocks
        else:
            left, is_done = work, True
        if is_done:
            del self.waiting[work.arrival]
        else:
            self.waiting[work.arrival] = left


sessions = st.integers(1, 6)
works = st.one_of(
    st.builds(
        Waiting,
        st.just(0),
        st.just(Kind.DECODE),
        sessions,
        st.sampled_from("ab"),
        num_rows=st.integers(1, 6),
        position=st.integers(0, 120),
    ),
    st.builds(
        Waiting, st.just(0), st.just(Kind.PREFILL), sessions, num_rows=st.integers(1, 12), num_tokens=st.integers(2, 40)
    ),
    st.builds(Waiting, st.just(0), st.just(Kind.FORWARD), num_tokens=st.integers(0, 40), num_blocks=st.integers(1, 5)),
    st.builds(Waiting, st.just(0), st.just(Kind.ALLOCATE)),
)


@given(st.lists(st.lists(works, max_size=3), max_size=25))
@settings(max_examples=200, deadline=None)
def test_any_traffic_ends_within_the_limits_and_nobody_waits_for_two_pieces(traffic: list[list[Waiting]]) -> None:
    simulation = Simulation()
    for arriving in traffic:
        for work in arriving:
            simulation.arrive(work)
        simulation.turn()
    while simulation.turn():
        pass
    assert not simulation.waiting
    # Without sessions in the way, work starts in the order in which it came.
    assert simulation.started[Kind.FORWARD] == sorted(simulation.started[Kind.FORWARD])


@given(works, st.lists(works.filter(lambda work: work.session != 9), min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_nobody_starves_among_others_that_never_stop(lone: Waiting, others: list[Waiting]) -> None:
    simulation = Simulation()
    for work in others:
        simulation.arrive(work)
    simulation.arrive(replace(lone, session=None if lone.session is None else 9))
    arrival = simulation.num_arrived
    for _ in range(2000):
        if arrival not in simulation.waiting:
            return
        num_before = len(simulation.waiting)
        simulation.turn()
        # Whoever is done comes back at once; allocations do not, a peer has to pay for each with a session.
        for number in range(num_before - len(simulation.waiting)):
            work = others[number % len(others)]
            if work.kind is not Kind.ALLOCATE:
                simulation.arrive(work)
    pytest.fail(f"{lone} still waits")
