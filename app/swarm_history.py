"""Pure: what the site's own test answers say of a model's last day and month: how often they came, how fast, and since
when they do not.

An incident is a run of failed answers: it begins with the first of them and ends with the next one that came.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

DAY_S, MONTH_S = 86_400.0, 30 * 86_400.0
OK = "ok"
RECENT_S = 3600.0
"""How long a measured speed stands for the present one."""

MAX_INCIDENTS = 10
SPARK_BUCKETS = 60
"""Points of a line; a day has one for 24 minutes, a month one for 12 hours."""


class Run(Protocol):
    """One test answer. `started_at` is in seconds since the epoch; `outcome` is `ok` or an error's code."""

    @property
    def started_at(self) -> float: ...
    @property
    def outcome(self) -> str: ...
    @property
    def first_token_s(self) -> float | None: ...
    @property
    def tokens_per_s(self) -> float | None: ...
    @property
    def min_replicas(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Incident:
    """Answers failed from `began_at` on, for `lasted_s` so far or in all; `cause` is the first failure's code."""

    began_at: float
    lasted_s: float
    cause: str
    is_open: bool


@dataclass(frozen=True, slots=True)
class SparkPoint:
    """A bucket of time: where it is between 0 and 1, its median speed as a share of the highest, None without any."""

    at: float
    level: float | None
    has_failed: bool


@dataclass(frozen=True, slots=True)
class PeriodReport:
    """One period. `uptime` is the share of answers that came, None without any; speeds are of those that came.

    `min_replicas` are the fewest nodes that any block had at one of them.
    """

    length_s: float
    num_runs: int
    uptime: float | None
    lowest: float | None
    highest: float | None
    first_token_s: float | None
    min_replicas: int | None
    points: tuple[SparkPoint, ...]


@dataclass(frozen=True, slots=True)
class HistoryReport:
    """A model's day, its month, and the month's last incidents, the newest first."""

    day: PeriodReport
    month: PeriodReport
    incidents: tuple[Incident, ...]


def history_report(runs: Sequence[Run], now: float) -> HistoryReport:
    """Return what `runs` of one model say at `now`; those older than a month do not count."""
    ordered = sorted((run for run in runs if now - MONTH_S <= run.started_at <= now), key=lambda run: run.started_at)
    found = incidents(ordered, now)
    return HistoryReport(period(ordered, DAY_S, now), period(ordered, MONTH_S, now), found[:MAX_INCIDENTS])


def period(runs: Sequence[Run], length_s: float, now: float) -> PeriodReport:
    """Return the last `length_s` seconds of `runs`."""
    begin = now - length_s
    inside = [run for run in runs if run.started_at >= begin]
    came = [run for run in inside if run.outcome == OK]
    speeds = [run.tokens_per_s for run in came if run.tokens_per_s]
    waits = [run.first_token_s for run in came if run.first_token_s is not None]
    return PeriodReport(
        length_s,
        len(inside),
        len(came) / len(inside) if inside else None,
        min(speeds, default=None),
        max(speeds, default=None),
        median(waits) if waits else None,
        min((run.min_replicas for run in inside), default=None),
        _points(inside, begin, length_s, max(speeds, default=0.0)),
    )


def incidents(runs: Sequence[Run], now: float) -> tuple[Incident, ...]:
    """Return the incidents in `runs`, which are in order of time; the newest one first."""
    found: list[Incident] = []
    first: Run | None = None
    for run in runs:
        if run.outcome != OK:
            first = first or run
        elif first is not None:
            found.append(Incident(first.started_at, run.started_at - first.started_at, first.outcome, False))
            first = None
    if first is not None:
        found.append(Incident(first.started_at, now - first.started_at, first.outcome, True))
    return tuple(reversed(found))


def recent_speed(runs: Sequence[Run], now: float) -> float | None:
    """Return the tokens/s of the last answer if it came, and lately."""
    last = max(runs, key=lambda run: run.started_at, default=None)
    if last is None or last.outcome != OK or now - last.started_at > RECENT_S:
        return None
    return last.tokens_per_s


def _points(runs: Sequence[Run], begin: float, length_s: float, highest: float) -> tuple[SparkPoint, ...]:
    buckets: dict[int, list[Run]] = {}
    for run in runs:
        buckets.setdefault(min(int((run.started_at - begin) / length_s * SPARK_BUCKETS), SPARK_BUCKETS - 1), []).append(
            run
        )
    points = []
    for number, inside in sorted(buckets.items()):
        speeds = [run.tokens_per_s for run in inside if run.outcome == OK and run.tokens_per_s]
        level = median(speeds) / highest if speeds and highest else None
        points.append(SparkPoint((number + 0.5) / SPARK_BUCKETS, level, any(run.outcome != OK for run in inside)))
    return tuple(points)
