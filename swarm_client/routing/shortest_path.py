"""Pure: the shortest way through spans of blocks, by dynamic programming over blocks and nodes.

The state is (blocks done, node that did the last of them). A node may be entered and left at any block that it may run.
From one block to the next a state goes on at its node, or to another node: along a measured link, of which there are
few, or through the client, which costs a part of the first node and a part of the second, so that the best first node
is the same for all second ones. A block takes O(nodes + links).

Costs are whole tenths of microseconds, shifted left by 16 bits, and the low bits count the hops: one comparison prefers
the cheaper way, and of equally cheap ones that with fewer hops.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

Costs = npt.NDArray[np.int64]

_SHIFT: Final = 16
_HOPS_MASK: Final = (1 << _SHIFT) - 1
_INFINITE: Final = 1 << 61
_MAX_SPLITS: Final = 8
"""Parts that are searched for a path that visits no node twice; each takes some milliseconds among 1,000 nodes."""

Stretch = tuple[int, int, int]
"""Node, first block, end block."""


def packed(seconds: Sequence[float] | npt.NDArray[np.float64]) -> Costs:
    """Return costs as this module counts them; what is beyond bearing counts as 1,000 s, so that sums stay in range."""
    return np.rint(np.minimum(np.asarray(seconds, dtype=np.float64), 1000.0) * 1e7).astype(np.int64) << _SHIFT


@dataclass(frozen=True)
class PathProblem:
    """What to find a path through; all costs as `packed`, nodes by index.

    allowed   (blocks, nodes): where a node may run a block; at least one node at every block
    one_way   (nodes,): between client and node
    visit     (nodes,): for each visit
    block     (nodes,): for each block
    sources, targets, links   measured ways between nodes, sorted by target
    """

    allowed: npt.NDArray[np.bool_]
    one_way: Costs
    visit: Costs
    block: Costs
    sources: npt.NDArray[np.intp]
    targets: npt.NDArray[np.intp]
    links: Costs


def varied_path(problem: PathProblem, slack: float, choose: Callable[[Sequence[int]], int]) -> list[Stretch]:
    """Return a path by chance that costs at most `slack` more than the shortest and has no more hops.

    It is built from its end: at each hop `choose` picks one of the nodes from which the rest can be had within what is
    left of the slack. Where two nodes overlap they meet at the best block, so chance decides among nodes, not cuts. If
    the choices lead to where only a second visit would help, the shortest path is taken.
    """
    table = _Table(problem)
    best = _shortest(table)
    cost = path_cost(problem, best)
    most, most_hops = int((cost >> _SHIFT) * (1 + slack)), cost & _HOPS_MASK

    def pick(options: Costs) -> int | None:
        within = np.flatnonzero(((options >> _SHIFT) <= most) & ((options & _HOPS_MASK) <= most_hops))
        return choose(within.tolist()) if len(within) else None

    return table.walk(pick, may_return=False) or best


def path_cost(problem: PathProblem, path: Sequence[Stretch]) -> int:
    """Return the cost of a path as `packed`, with its hops in the low bits."""
    first, last = path[0][0], path[-1][0]
    total = int(problem.one_way[first] + problem.one_way[last])
    for number, (node, start, end) in enumerate(path):
        total += int(problem.visit[node]) + 1 + int(problem.block[node]) * (end - start)
        if number:
            total += int(_links_to(problem, node)[path[number - 1][0]])
    return total


class _Table:
    """The least costs of all states of a problem."""

    def __init__(self, problem: PathProblem) -> None:
        self.problem = problem
        self._visit = problem.visit + 1
        num_blocks, num_nodes = problem.allowed.shape
        self._costs = np.full((num_blocks + 1, num_nodes), _INFINITE, dtype=np.int64)
        self._fill()

    @property
    def least(self) -> int:
        """The cost of the cheapest path, which may visit a node twice."""
        return int((self._costs[-1] + self.problem.one_way).min())

    def _fill(self) -> None:
        problem, costs = self.problem, self._costs
        is_first = np.diff(problem.targets, prepend=-1) != 0
        groups, entered_by_link = np.flatnonzero(is_first), problem.targets[is_first]
        entered = problem.one_way + self._visit
        visit_by_link = self._visit[entered_by_link]
        for block, allowed in enumerate(problem.allowed):
            if block == 0:
                done = entered
            else:
                before = costs[block]
                done = np.minimum(before, entered + (before + problem.one_way).min())
                if len(groups):
                    arrived = np.minimum.reduceat(before[problem.sources] + problem.links, groups) + visit_by_link
                    done[entered_by_link] = np.minimum(done[entered_by_link], arrived)
            np.copyto(costs[block + 1], done + problem.block, where=allowed)

    def walk(self, pick: Callable[[Costs], int | None], *, may_return: bool) -> list[Stretch] | None:
        """Return a path, built from its end: `pick` gets what whole paths through each possible node before cost.

        None if it picks none. A path that may not return has no node twice.
        """
        problem = self.problem
        end, num_nodes = problem.allowed.shape
        path: list[Stretch] = []
        node = pick(self._costs[end] + problem.one_way)
        behind = 0 if node is None else int(problem.one_way[node])
        while node is not None:
            options, starts = self._options(node, end, behind)
            options[[node] if may_return else [node, *(stretch[0] for stretch in path)]] = _INFINITE
            chosen = pick(options)
            if chosen is None:
                break
            path.append((node, int(starts[chosen]), end))
            if chosen == num_nodes:
                return path[::-1]
            behind += int(self._visit[node]) + int(problem.block[node]) * (end - int(starts[chosen]))
            behind += int(_links_to(problem, node)[chosen])
            node, end = chosen, int(starts[chosen])
        return None

    def _options(self, node: int, end: int, behind: int) -> tuple[Costs, npt.NDArray[np.intp]]:
        """Return what the whole path costs with each node before `node`, and at which block `node` then takes over.

        `behind` is what follows `node`, which runs the blocks up to `end`. The last option is that the path begins with
        it.
        """
        problem = self.problem
        is_out = np.flatnonzero(~problem.allowed[:end, node])
        first = int(is_out[-1]) + 1 if len(is_out) else 0
        behind += int(self._visit[node])
        options = np.full(problem.allowed.shape[1] + 1, _INFINITE, dtype=np.int64)
        starts = np.zeros(len(options), dtype=np.intp)
        between = np.arange(max(1, first), end)
        if len(between):
            totals = self._costs[between] + (behind + problem.block[node] * (end - between))[:, None]
            best = totals.argmin(axis=0)
            starts[:-1] = between[best]
            options[:-1] = totals[best, np.arange(totals.shape[1])] + _links_to(problem, node)
        if first == 0:
            options[-1] = behind + int(problem.block[node]) * end + int(problem.one_way[node])
        return options, starts


def _links_to(problem: PathProblem, node: int) -> Costs:
    """Return the ways from all nodes to `node`."""
    links: Costs = problem.one_way + problem.one_way[node]
    low, high = np.searchsorted(problem.targets, (node, node + 1))
    sources = problem.sources[low:high]
    np.minimum.at(links, sources, problem.links[low:high])
    return links


def _shortest(table: _Table) -> list[Stretch]:
    """Return the shortest path that visits no node twice.

    Visiting a node twice may be cheaper; then the search splits: the node runs all of the blocks between, or only
    blocks before the second visit, or only blocks behind the first. The part with the lowest bound goes on first. That
    is exact within `_MAX_SPLITS` parts; beyond them the nodes run the blocks between their visits.
    """
    waiting = [table]
    last_resorts: list[list[Stretch]] = []
    for _ in range(_MAX_SPLITS):
        table = min(waiting, key=lambda one: one.least)
        waiting.remove(table)
        problem = table.problem
        path = table.walk(lambda options: int(options.argmin()), may_return=True)
        assert path is not None
        returned = _return(path)
        if returned is None:
            return path
        last_resorts.append(_without_returns(path))
        splits = (replace(problem, allowed=allowed) for allowed in _splits(problem.allowed, *returned))
        waiting += [_Table(split) for split in splits if split.allowed.any(axis=1).all()]
        if not waiting:
            break
    return min(last_resorts, key=lambda path: path_cost(problem, path))


def _splits(allowed: npt.NDArray[np.bool_], node: int, left: int, back: int) -> list[npt.NDArray[np.bool_]]:
    """Return what may run where in the three cases for a node that leaves at block `left` and is back at `back`."""
    whole, early, late = allowed.copy(), allowed.copy(), allowed.copy()
    whole[left:back] = False
    whole[left:back, node] = allowed[left:back, node]
    early[back - 1 :, node] = False
    late[: left + 1, node] = False
    return [whole, early, late]


def _return(path: Sequence[Stretch]) -> tuple[int, int, int] | None:
    """Return the first node that comes twice, the block at which it is left and that at which it is back."""
    left: dict[int, int] = {}
    for node, start, end in path:
        if node in left:
            return node, left[node], start
        left[node] = end
    return None


def _without_returns(path: list[Stretch]) -> list[Stretch]:
    """Let nodes that come twice run the blocks between."""
    while (returned := _return(path)) is not None:
        first = next(index for index, stretch in enumerate(path) if stretch[0] == returned[0])
        last = max(index for index, stretch in enumerate(path) if stretch[0] == returned[0])
        path = [*path[:first], (returned[0], path[first][1], path[last][2]), *path[last + 1 :]]
    return path
