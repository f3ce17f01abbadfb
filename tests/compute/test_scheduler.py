"""Who runs next on the device: tables of single decisions, and rules that hold for any traffic."""

from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server_node.compute.device_shares import ShareLimits
from server_node.compute.scheduler import Batch, BatchLimits, Kind, Scheduler, Waiting
from swarm_protocol.ids import PeerId

LIMITS = BatchLimits(
    chunk_tokens=8,
    max_rows=4,
    max_padded_tokens=100,
    forward_every=3,
    small_chunk_tokens=2,
    shares=ShareLimits(burst_s=20.0, share=0.125, active_s=30.0),
)
ALICE, BOB, CAROL = PeerId("alice"), PeerId("bob"), PeerId("carol")


def decode(arrival: int, session: int | None = None, **fields: object) -> Waiting:
    return Waiting(arrival, Kind.DECODE, session or arrival, **fields)  # type: ignore[arg-type]


def prefill(arrival: int, num_tokens: int = 20, **fields: object) -> Waiting:
    return Waiting(arrival, Kind.PREFILL, 1000 + arrival, num_tokens=num_tokens, **fields)  # type: ignore[arg-type]


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
        # where not all fit, the peers share the rows
        (
            [
                decode(1, peer=ALICE),
                decode(2, peer=ALICE),
                decode(3, peer=ALICE),
                decode(4, peer=ALICE),
                decode(5, peer=BOB),
                decode(6, peer=BOB),
                decode(7, peer=BOB),
            ],
            Batch(Kind.DECODE, (1, 2, 5, 6)),
        ),
        (
            [*(decode(n, peer=ALICE) for n in range(1, 9)), decode(9, peer=BOB)],
            Batch(Kind.DECODE, (1, 2, 3, 9)),
        ),
        (
            [decode(1, num_rows=3, peer=ALICE), decode(2, peer=ALICE), decode(3, num_rows=2, peer=BOB)],
            Batch(Kind.DECODE, (1, 2)),
        ),
        # no piece has run, so nobody waited for one yet: a decode step comes after at most one
        ([prefill(1), decode(2)], Batch(Kind.PREFILL, (1,), 8)),
    ],
)
def test_a_decision(waiting: list[Waiting], wanted: Batch | None) -> None:
    assert Scheduler(LIMITS).next_batch(waiting, 0.0) == wanted


def test_decode_steps_and_pieces_alternate() -> None:
    scheduler = Scheduler(LIMITS)
    kinds = []
    for turn in range(6):
        # A session that comes back at once, and a prefill that never ends.
        batch = scheduler.next_batch([prefill(1), decode(2 + turn, 2)], turn)
        assert batch is not None
        kinds.append(batch.kind)
    assert kinds == [Kind.PREFILL, Kind.DECODE] * 3


def test_all_who_waited_for_a_piece_run_before_the_next_one() -> None:
    scheduler = Scheduler(LIMITS)
    waiting = [prefill(1), *(decode(arrival, num_rows=2) for arrival in range(2, 8))]
    served = []
    for _ in range(5):
        batch = scheduler.next_batch(waiting, 0.0)
        assert batch is not None
        served.append(batch.arrivals)
        waiting = [work for work in waiting if work.kind is Kind.PREFILL or work.arrival not in batch.arrivals]
    assert served == [(1,), (2, 3), (4, 5), (6, 7), (1,)]


def test_forwards_get_a_share_of_the_pieces() -> None:
    scheduler = Scheduler(LIMITS)
    batches = [scheduler.next_batch([forward(1), prefill(2)], 0.0) for _ in range(6)]
    assert [batch.arrivals[0] for batch in batches if batch] == [2, 2, 1, 2, 2, 1]


def test_peers_take_turns_in_leading_batches() -> None:
    scheduler = Scheduler(LIMITS)
    # Alice's sessions cannot run together; Bob comes back at once, and last.
    served = []
    for turn in range(6):
        waiting = [decode(n, group=n, peer=ALICE) for n in range(1, 9) if (n,) not in served]
        batch = scheduler.next_batch([*waiting, decode(50 + turn, 50, group="b", peer=BOB)], turn)
        assert batch is not None
        served.append(batch.arrivals)
    assert served == [(1,), (51,), (2,), (53,), (3,), (55,)]


def test_a_peer_whose_steps_cannot_join_does_not_hold_up_the_pieces_of_others() -> None:
    scheduler = Scheduler(replace(LIMITS, max_batches_between=3))
    waiting = [prefill(1, 16, peer=BOB), *(decode(n, group=n, peer=ALICE) for n in range(2, 9))]
    served = []
    for turn in range(6):
        batch = scheduler.next_batch(waiting, turn)
        assert batch is not None
        served.append(batch.arrivals[0])
        waiting = [work for work in waiting if work.kind is Kind.PREFILL or work.arrival not in batch.arrivals]
    assert served == [1, 2, 3, 4, 1, 5]


@dataclass
class Device:
    """A device that takes its time, and peers whose work never ends."""

    scheduler: Scheduler = field(default_factory=lambda: Scheduler(LIMITS))
    now_s: float = 0.0
    num_arrived: int = 0
    taken_s: Counter[tuple[PeerId, Kind]] = field(default_factory=Counter)
    tokens: Counter[PeerId] = field(default_factory=Counter)
    amounts: dict[PeerId, list[int]] = field(default_factory=dict)

    def run(self, until_s: float, endless: list[Waiting], think_s: float = 0.0) -> None:
        """Run work that comes back at once, decode steps after `think_s`; tokens take 1 s in pieces, steps 1 s."""
        own = [work if work.session is None else replace(work, session=number) for number, work in enumerate(endless)]
        waiting = [self._anew(work) for work in own]
        while self.now_s < until_s:
            ready = sorted((w for w in waiting if w.since_s <= self.now_s), key=lambda work: work.arrival)
            batch = self.scheduler.next_batch(ready, self.now_s)
            if batch is None:
                later = [work.since_s for work in waiting if work.since_s > self.now_s]
                self.now_s = min([*later, *([self.now_s + max(1e-6, self.scheduler.wait_s)] if ready else [])])
                continue
            chosen = [work for work in waiting if work.arrival in batch.arrivals]
            taken_s = float(max(1, batch.amount))
            self.now_s += taken_s
            self.scheduler.ended(self.now_s)
            for work in chosen:
                self.taken_s[work.peer, work.kind] += taken_s
                self.tokens[work.peer] += 1
                self.amounts.setdefault(work.peer, []).append(batch.amount)
                waiting.remove(work)
                waiting.append(self._anew(work, think_s if work.kind is Kind.DECODE else 0.0))

    def _anew(self, work: Waiting, think_s: float = 0.0) -> Waiting:
        self.num_arrived += 1
        return replace(work, arrival=self.num_arrived, since_s=self.now_s + think_s)


@pytest.mark.parametrize("think_s", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("flood", [[prefill(0, 1000, peer=BOB)], [forward(0, 1, num_blocks=1, peer=BOB)] * 9])
def test_pieces_of_a_peer_cost_another_ones_decode_its_burst_and_a_share(think_s: float, flood: list[Waiting]) -> None:
    device = Device()
    device.run(4000.0, [decode(0, 1, peer=ALICE), *flood], think_s)
    alone = 4000.0 / (1 + think_s)
    lost_s = LIMITS.shares.burst_s + LIMITS.chunk_tokens
    assert device.tokens[ALICE] >= (1 - LIMITS.shares.share) * (alone - lost_s) - 1
    # It is not starved either, and its pieces are small by then.
    pieces_s = device.taken_s[BOB, flood[0].kind]
    assert pieces_s >= 0.9 * LIMITS.shares.share * 4000.0
    if flood[0].kind is Kind.PREFILL:
        assert device.amounts[BOB][0] == LIMITS.chunk_tokens
        assert device.amounts[BOB][-1] == LIMITS.small_chunk_tokens


def test_a_peer_that_is_alone_is_never_held() -> None:
    device = Device()
    device.run(1000.0, [prefill(0, 1000, peer=BOB), decode(0, 1, peer=BOB), forward(0, 5, num_blocks=3, peer=BOB)])
    assert sum(device.taken_s.values()) >= 1000.0


def test_others_may_run_pieces_while_a_session_is_seldom_heard_of() -> None:
    device = Device()
    device.run(2000.0, [prefill(0, 1000, peer=BOB), decode(0, 1, peer=ALICE)], think_s=100.0)
    # Alice gives the device a hundredth of her time, so Bob has nearly all of the rest.
    assert device.taken_s[BOB, Kind.PREFILL] >= 0.8 * 2000.0
    assert device.tokens[ALICE] >= 0.9 * 2000.0 / 101.0


def test_steps_of_no_tokens_hold_nobody_back() -> None:
    device = Device()
    device.run(1000.0, [prefill(0, 1000, peer=BOB), decode(0, 1, num_tokens=0, peer=ALICE)])
    assert device.taken_s[BOB, Kind.PREFILL] >= 0.6 * 1000.0


def test_a_newcomer_goes_before_those_that_are_over_their_burst_and_then_shares() -> None:
    device = Device()
    device.run(100.0, [prefill(0, 1000, peer=BOB)])
    bobs_s = device.taken_s[BOB, Kind.PREFILL]
    device.run(115.0, [prefill(0, 1000, peer=BOB), prefill(0, 1000, peer=ALICE)])
    assert device.taken_s[BOB, Kind.PREFILL] == bobs_s
    device.run(1115.0, [prefill(0, 1000, peer=BOB), forward(0, 1000, num_blocks=9, peer=CAROL)])
    assert device.taken_s[CAROL, Kind.FORWARD] >= 0.1 * 1000.0


def test_a_peer_that_used_an_idle_node_for_long_has_no_burst_when_others_come() -> None:
    device = Device()
    device.run(1000.0, [prefill(0, 1000, peer=BOB)])
    device.run(1100.0, [prefill(0, 1000, peer=BOB), decode(0, 1, peer=ALICE)])
    assert device.tokens[ALICE] >= 0.8 * 100.0


@dataclass
class Simulation:
    """Traffic against a scheduler. Every turn some work arrives and one batch runs."""

    scheduler: Scheduler = field(default_factory=lambda: Scheduler(LIMITS))
    waiting: dict[int, Waiting] = field(default_factory=dict)
    pieces_waited: dict[int, int] = field(default_factory=dict)
    num_arrived: int = 0
    now_s: float = 0.0

    def arrive(self, work: Waiting) -> None:
        self.num_arrived += 1
        # A session is one peer's.
        peer = work.peer if work.session is None else (ALICE, BOB, CAROL)[work.session % 3]
        self.waiting[self.num_arrived] = replace(work, arrival=self.num_arrived, peer=peer, since_s=self.now_s)
        self.pieces_waited[self.num_arrived] = 0

    def turn(self) -> Batch | None:
        batch = self.scheduler.next_batch(list(self.waiting.values()), self.now_s)
        while batch is None and self.waiting:
            assert {work.kind for work in self.waiting.values()} <= {Kind.PREFILL, Kind.FORWARD, Kind.DECODE}
            assert self.scheduler.wait_s > 0
            self.now_s += self.scheduler.wait_s + 1e-6
            batch = self.scheduler.next_batch(list(self.waiting.values()), self.now_s)
        if batch is None:
            return None
        self.now_s += max(1, batch.amount)
        self.scheduler.ended(self.now_s)
        chosen = [self.waiting[arrival] for arrival in batch.arrivals]
        self._check_limits(batch, chosen)
        for work in chosen:
            self._progress(work, batch)
        for arrival, work in self.waiting.items():
            if batch.amount and work.kind is Kind.DECODE and not self._is_blocked(work):
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
        # Of one peer of the batch, nobody of the same kind who could run is older.
        blocked = {work.arrival for work in self.waiting.values() if self._is_blocked(work)}
        assert any(
            all(
                other.arrival in blocked or other.arrival >= work.arrival
                for other in self.waiting.values()
                if other.kind is batch.kind and other.peer == work.peer
            )
            for work in chosen
        )

    def _is_blocked(self, work: Waiting) -> bool:
        older = (other for other in self.waiting.values() if other.arrival < work.arrival)
        return work.session is not None and any(other.session == work.session for other in older)

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
    st.builds(
        Waiting,
        st.just(0),
        st.just(Kind.FORWARD),
        num_tokens=st.integers(0, 40),
        num_blocks=st.integers(1, 5),
        peer=st.sampled_from([ALICE, BOB, CAROL]),
    ),
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
