"""Made-up swarms that come, churn and rest, placed by our rule or by the predecessor's, for `bench.placement`.

What they hold: 16 to 80 blocks; 3 to 1,000 nodes, as many small swarms as large ones (log-uniform), and in every
twentieth 1,000 nodes and 80 blocks. Speeds are log-normal (sigma 0.7: of ten nodes the fastest is some ten times as
fast as the slowest), memory is for 5 to 60 % of the blocks (log-uniform), for 1.2 times the model in all at least.

How they live: nodes join one after the other and all at once, so that nobody moves in between; then they have four
hours to settle; then for an hour a quarter of the nodes leaves and as many others come, at random; then they settle
again. Claims for moves are won every two minutes, by one node each; real nodes go to a block that is missing sooner.
All records are true and seen by all at once.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from server_node.move_turns import ROUND_S as CLAIM_ROUND_S
from server_node.move_turns import ROUNDS_FOR_SPEED, may_look, round_of, winner
from server_node.placement import Holder, Joiner, choose_span, layout_of
from server_node.placement_plan import MIN_GAIN, Plan, next_moves, plan_moves
from server_node.placement_search import Floats, Layout, attainable
from swarm_protocol.move_claims import MoveClaim
from swarm_protocol.spans import Span

ROUND_S = CLAIM_ROUND_S * ROUNDS_FOR_SPEED
CHURN_S, SETTLING_S = 3600.0, 4 * 3600.0
SHARE_REPLACED = 0.25

BALANCE_QUALITY = 0.75
CHECKS_PER_ROUND = 5
"""Nodes that ask themselves in two minutes whether to move by the predecessor's rule; there each does once a minute,
but a check is a simulation of all nodes."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A node before it has blocks."""

    peer_id: str
    block_step_s: float
    max_blocks: int


@dataclass(frozen=True, slots=True)
class MadeUpSwarm:
    """The machines of a seed, those that are there first and those that come later, in order."""

    seed: int
    num_blocks: int
    first: list[Machine]
    later: list[Machine]


MAX_NODES, MAX_BLOCKS = 1000, 80


def make_swarm(seed: int, num_nodes: int | None = None, num_blocks: int | None = None) -> MadeUpSwarm:
    """Return the swarm of `seed`, of a random size where none is given."""
    rng = random.Random(seed)
    if seed % 20 == 19 and num_nodes is None:
        num_nodes, num_blocks = MAX_NODES, MAX_BLOCKS
    return _make_swarm(seed, rng, num_nodes, num_blocks)


def _make_swarm(seed: int, rng: random.Random, wanted_nodes: int | None, wanted_blocks: int | None) -> MadeUpSwarm:
    while True:
        num_blocks = wanted_blocks or rng.choice([16, 24, 32, 48, 64, MAX_BLOCKS])
        num_nodes = wanted_nodes or round(3 * (MAX_NODES / 3) ** rng.random())
        machines = [_machine(f"{seed}/{index}", num_blocks, rng) for index in range(num_nodes)]
        if sum(machine.max_blocks for machine in machines) >= 1.2 * num_blocks:
            break
    num_later = max(1, round(SHARE_REPLACED * num_nodes))
    later = [_machine(f"{seed}/{num_nodes + index}", num_blocks, rng) for index in range(num_later)]
    return MadeUpSwarm(seed, num_blocks, machines, later)


def _machine(peer_id: str, num_blocks: int, rng: random.Random) -> Machine:
    share = 0.05 * (0.6 / 0.05) ** rng.random()
    return Machine(peer_id, 0.01 * rng.lognormvariate(0, 0.7), max(1, round(num_blocks * share)))


def bound(holders: list[Holder], num_blocks: int) -> float:
    """Return the tokens/s of the weakest block that no placement of these nodes can pass."""
    layout = layout_of(num_blocks, holders)
    return attainable(layout.rates, layout.most, num_blocks)


@dataclass(slots=True)
class State:
    """A swarm at a time; a rule changes `holders` and counts its moves."""

    num_blocks: int
    rng: random.Random
    holders: list[Holder] = field(default_factory=list)
    arrived_s: dict[str, float] = field(default_factory=dict)
    num_moves: int = 0

    @property
    def layout(self) -> Layout:
        """Who holds what."""
        return layout_of(self.num_blocks, self.holders)

    def add(self, machine: Machine, span: Span, now_s: float) -> None:
        """Let a machine come."""
        self.holders.append(Holder(machine.peer_id, span, machine.block_step_s, machine.max_blocks))
        self.arrived_s[machine.peer_id] = now_s

    def move(self, peer_id: str, span: Span, now_s: float) -> None:
        """Let a node take other blocks."""
        self.holders = [replace(held, span=span) if held.peer_id == peer_id else held for held in self.holders]
        self.arrived_s[peer_id] = now_s
        self.num_moves += 1


class OurRule:
    """`server_node.placement` and `server_node.placement_plan`, or a variant of them.

    With `holds_all_that_fits` no node holds fewer blocks than it has memory for; unless `is_memory_known` nobody plans
    for more blocks than a node holds already.
    """

    def __init__(
        self, min_gain: float = MIN_GAIN, *, holds_all_that_fits: bool = False, is_memory_known: bool = True
    ) -> None:
        self._min_gain = min_gain
        self._holds_all_that_fits = holds_all_that_fits
        self._is_memory_known = is_memory_known
        self._plan: Plan | None = None
        self._planned_for: list[Holder] = []

    def join(self, state: State, machine: Machine, now_s: float) -> None:
        """Give a machine its first blocks."""
        least = machine.max_blocks if self._holds_all_that_fits else 1
        joiner = Joiner(machine.max_blocks, least, machine.block_step_s)
        state.add(machine, choose_span(state.num_blocks, joiner, state.holders), now_s)

    def round(self, state: State, now_s: float) -> bool:
        """Let the winner of a round of claims move; return whether the swarm rests."""
        moves = next_moves(self._plan, state.holders) if self._plan is not None else ()
        if not moves and state.holders != self._planned_for:
            known = [self._known_of(holder) for holder in state.holders]
            self._plan = plan_moves(state.num_blocks, known, self._min_gain)
            self._planned_for = state.holders[:]
            moves = next_moves(self._plan, state.holders) if self._plan is not None else ()
        is_missing = not state.layout.num_holders.all()
        claims = {
            MoveClaim(move.peer_id, move.new.start, move.new.end, round_of(now_s)): move
            for move in moves
            if may_look(state.arrived_s[move.peer_id], move.peer_id, now_s, is_a_block_missing=is_missing)
        }
        won = winner(list(claims), round_of(now_s))
        if won is not None:
            state.move(won.peer_id, claims[won].new, now_s)
        return not moves

    def _known_of(self, holder: Holder) -> Holder:
        known = holder if self._is_memory_known else replace(holder, max_blocks=None)
        return replace(known, is_length_fixed=self._holds_all_that_fits)


class PredecessorsRule:
    """Petals' `block_selection.py` (release 2.2.0): all blocks that fit, at the window that is weakest, sorted upwards.

    A node asks whether to move: it takes its best window, then all others do so in random order until nobody moves any
    more; if the weakest block is below 0.75 of what that leads to, it moves. Its servers publish another throughput,
    which supposes that routes use half of a span; here the rule gets what the bench judges by, rate / blocks held.
    """

    def join(self, state: State, machine: Machine, now_s: float) -> None:
        """Give a machine its first blocks."""
        load = state.layout.load if state.holders else np.zeros(state.num_blocks)
        start = _weakest_window(load, machine.max_blocks)
        state.add(machine, Span(start, start + machine.max_blocks), now_s)

    def round(self, state: State, now_s: float) -> bool:
        """Let some nodes ask themselves; return whether the swarm rests, as far as a bound tells."""
        for _ in range(CHECKS_PER_ROUND):
            layout = state.layout
            if layout.weakest >= BALANCE_QUALITY * attainable(layout.rates, layout.lengths, state.num_blocks):
                return True
            node = state.rng.randrange(len(state.holders))
            start = self._better_start(layout, node, state.rng)
            if start is not None:
                state.move(state.holders[node].peer_id, Span(start, start + int(layout.lengths[node])), now_s)
        return False

    def _better_start(self, layout: Layout, node: int, rng: random.Random) -> int | None:
        before, old = layout.weakest, int(layout.starts[node])
        layout.take_out(node)
        if before > 0 and not layout.num_holders.all():
            return None
        new = _weakest_window(layout.load, int(layout.lengths[node]))
        layout.put_in(node, new, int(layout.lengths[node]))
        if new == old:
            return None
        nodes = list(range(len(layout.rates)))
        for _ in range(10):  # there without a limit; it rarely takes five
            rng.shuffle(nodes)
            if not sum(_moves_to_weakest(layout, other) for other in nodes):
                break
        is_worth_it = before < (BALANCE_QUALITY - 1e-3) * layout.weakest
        return new if is_worth_it else None


def _moves_to_weakest(layout: Layout, node: int) -> bool:
    old, length = int(layout.starts[node]), int(layout.lengths[node])
    layout.take_out(node)
    # A little less than nothing, as there: where windows are equal, the node stays.
    layout.load[old : old + length] -= 1e-3 * layout.rates[node] / length
    new = _weakest_window(layout.load, length)
    layout.load[old : old + length] += 1e-3 * layout.rates[node] / length
    layout.put_in(node, new, length)
    return new != old


def _weakest_window(load: Floats, length: int) -> int:
    windows = np.sort(np.lib.stride_tricks.sliding_window_view(load, length), axis=1)
    candidates = np.arange(len(windows))
    for column in range(length):
        values = windows[candidates, column]
        candidates = candidates[values <= values.min() + 1e-12]
        if len(candidates) == 1:
            break
    return int(candidates[0])


Rule = OurRule | PredecessorsRule


@dataclass(frozen=True, slots=True)
class Moves:
    """Moves per node and hour while no node comes or goes."""

    in_four_hours: float
    in_first_hour: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a swarm: its nodes after joins, at rest, and at rest after churn, and the moves on the way.

    `moves_in_churn` are per node and hour, too; `hours_missing` is how long of the hour of churn a block had no node.
    """

    joined: list[Holder]
    settled: list[Holder]
    churned: list[Holder]
    moves_settling: Moves
    moves_after_churn: Moves
    moves_in_churn: float
    hours_missing: float


def live_through(swarm: MadeUpSwarm, make_rule: Callable[[], Rule]) -> Outcome:
    """Let the machines of `swarm` join, settle, churn and settle again."""
    state, rule, now_s = State(swarm.num_blocks, random.Random(swarm.seed)), make_rule(), 0.0
    for machine in swarm.first:
        rule.join(state, machine, now_s)
    joined = state.holders[:]
    settling = _settle(state, rule, now_s)
    settled, state.num_moves, now_s = state.holders[:], 0, now_s + SETTLING_S
    num_missing = _churn(state, rule, swarm, now_s)
    in_churn, state.num_moves = state.num_moves / len(state.holders), 0
    after = _settle(state, rule, now_s + CHURN_S)
    return Outcome(joined, settled, state.holders[:], settling, after, in_churn,
                   num_missing * ROUND_S / 3600)  # fmt: skip


def _settle(state: State, rule: Rule, begin_s: float) -> Moves:
    num_in_first_hour = 0
    for number in range(int(SETTLING_S / ROUND_S)):
        is_at_rest = rule.round(state, begin_s + number * ROUND_S)
        if number * ROUND_S < 3600:
            num_in_first_hour = state.num_moves
        if is_at_rest:
            break
    return Moves(state.num_moves / len(state.holders) / (SETTLING_S / 3600), num_in_first_hour / len(state.holders))


def _churn(state: State, rule: Rule, swarm: MadeUpSwarm, begin_s: float) -> int:
    """Let nodes leave and come for an hour; return in how many rounds a block had no node at the end."""
    rng = random.Random(f"churn {swarm.seed}")
    events: list[tuple[float, Machine | None]] = [(rng.uniform(0, CHURN_S), machine) for machine in swarm.later]
    events += [(rng.uniform(0, CHURN_S), None) for _ in swarm.later]
    events.sort(key=lambda event: event[0])
    num_missing = 0
    for number in range(int(CHURN_S / ROUND_S)):
        while events and events[0][0] < (number + 1) * ROUND_S:
            at_s, machine = events.pop(0)
            if machine is not None:
                rule.join(state, machine, begin_s + at_s)
            elif len(state.holders) > 1:
                # By its place among the ids, not among the holders, so that all rules lose the same nodes.
                leaver = rng.choice(sorted(holder.peer_id for holder in state.holders))
                state.holders = [holder for holder in state.holders if holder.peer_id != leaver]
        rule.round(state, begin_s + (number + 1) * ROUND_S)
        num_missing += not state.layout.num_holders.all()
    return num_missing
