"""Pure: collects the times of a session's steps while it runs; the report is `generation_times`.

    resume → step → step → … → pause

Between `resume` and `pause` all time belongs to the generation: what lies behind a step is the client's, who makes a
token of its output. A session that is used without them counts from its first step on.
"""

import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from swarm_client.generation_times import SHARES, GenerationTimes, HopTimes, TimeShares
from swarm_protocol.ids import PeerId
from swarm_protocol.spans import Span

if TYPE_CHECKING:
    from swarm_client.leg import HopTiming

MAX_KEPT = 4096
"""Steps that medians are made of; sums are over all. As many as long answers have, in less than a megabyte a hop."""


QUEUE, COMPUTE, WIRE, CLIENT, STALL = range(len(SHARES))
"""Where the parts are in a list of seconds."""


class _Series:
    """Times of steps: their sums, and the latest of those that were one token's, undisturbed."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.sums = [0.0] * len(SHARES)
        self.tokens: deque[list[float]] = deque(maxlen=MAX_KEPT)

    def add(self, parts: list[float], *, is_token: bool) -> None:
        self.num_steps += 1
        _add(self.sums, parts)
        if is_token:
            self.tokens.append(parts)

    def medians(self, tokens_per_step: float) -> TimeShares:
        return TimeShares(*(statistics.median(part) / tokens_per_step for part in zip(*self.tokens, strict=True)))


class TimeLog:
    """Times are seconds of one monotonic clock. Used by the session's thread."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget everything: another generation begins."""
        self._steps = _Series()
        self._hops: dict[tuple[PeerId, Span], _Series] = {}
        self._first: list[float] | None = None
        self._last: list[float] | None = None  # the step whose token is being made
        self.is_last_a_token = False
        """Whether the last step was one token's, undisturbed; what was guessed behind it does not count."""
        self._drafted = self._num_drafted = self._num_accepted = 0  # of the next step; of all
        self._ahead = [0.0] * len(SHARES)  # spent for the step that is to come
        self._until_s: float | None = None  # up to when all is accounted for
        self._num_recoveries = self._recomputed_tokens = 0

    @contextmanager
    def generation(self, clock: Callable[[], float]) -> Iterator[None]:
        """Forget everything, and count what is done inside."""
        self.restart()
        with self.token(clock):
            yield

    @contextmanager
    def token(self, clock: Callable[[], float]) -> Iterator[None]:
        """Count what is done inside, which makes a token."""
        self.resume(clock())
        try:
            yield
        finally:
            self.pause(clock())

    def resume(self, now_s: float) -> None:
        """From now on time counts, until `pause`."""
        self._until_s = now_s

    def pause(self, now_s: float) -> None:
        """The token is there; what comes now is the caller's."""
        self._catch_up(now_s)
        self._until_s = None

    def opened(self, started_s: float, ended_s: float, stalled_s: float = 0.0) -> None:
        """A route was found and opened; for `stalled_s` of it blocks had no node."""
        self._catch_up(started_s)
        stall_s = min(stalled_s, ended_s - started_s)
        self._ahead[STALL] += stall_s
        self._ahead[WIRE] += ended_s - started_s - stall_s
        self._until_s = ended_s

    def drafts(self, num_tokens: int) -> None:
        """The next step carries so many guessed tokens besides its own."""
        self._drafted = num_tokens
        self._num_drafted += num_tokens

    def accepted(self, num_tokens: int) -> None:
        """So many of the guessed tokens were right."""
        self._num_accepted += num_tokens

    def stepped(
        self, started_s: float, ended_s: float, num_tokens: int, hops: "Sequence[HopTiming]", stalled_s: float = 0.0
    ) -> None:
        """A step of `num_tokens` columns came back; `hops` are the times of all its pieces at all hops.

        `stalled_s` of it went into recovering.
        """
        self._catch_up(started_s)
        parts, self._ahead = self._ahead, [0.0] * len(SHARES)
        wall_s = ended_s - started_s
        stall_s = min(wall_s, stalled_s)
        hops_s = sum(hop.total_s for hop in hops)
        is_single = num_tokens == 1 + self._drafted
        self.is_last_a_token = is_single and stall_s + parts[STALL] == 0 and self._steps.num_steps > 0
        # Where several hops worked at once a second there counts less.
        scale = 1.0 if hops_s <= wall_s - stall_s else (wall_s - stall_s) / hops_s
        for hop in hops:
            at_hop = _hop_parts(hop, scale)
            key = (hop.hop.peer_id, hop.hop.span)
            self._hops.setdefault(key, _Series()).add(at_hop, is_token=self.is_last_a_token)
            _add(parts, at_hop)
        parts[STALL] += stall_s
        parts[CLIENT] += max(0.0, wall_s - stall_s - hops_s * scale)
        self._last = parts
        self._until_s = ended_s

    def failed(self, started_s: float, ended_s: float) -> None:
        """A step came to nothing; the next one, if there is any, has to make up for it."""
        self.pause(started_s)
        self._ahead[STALL] += ended_s - started_s

    def recovered(self, num_tokens: int) -> None:
        """`num_tokens` were computed again."""
        self._num_recoveries += 1
        self._recomputed_tokens += num_tokens

    def report(self) -> GenerationTimes:
        """Return where the time went until now."""
        self._close()
        # A step behind the first brings so many tokens.
        later_steps = self._steps.num_steps - 1
        per_step = 1 + self._num_accepted / later_steps if later_steps > 0 else 1.0
        hops = tuple(
            HopTimes(span, peer_id, series.num_steps, TimeShares(*series.sums), series.medians(per_step))
            for (peer_id, span), series in sorted(self._hops.items(), key=lambda item: item[0][1])
        )
        return GenerationTimes(
            self._steps.num_steps + self._num_accepted,
            TimeShares(*self._steps.sums),
            TimeShares(*(self._first or ())),
            self._steps.medians(per_step),
            hops,
            self._num_recoveries,
            self._recomputed_tokens,
            self._num_drafted,
            self._num_accepted,
        )

    def _catch_up(self, now_s: float) -> None:
        """Give what is not accounted for to the client: to the token that is being made, or for the next step."""
        if self._until_s is not None:
            holder = self._ahead if self._last is None else self._last
            holder[CLIENT] += max(0.0, now_s - self._until_s)
        self._close()

    def _close(self) -> None:
        last, self._last = self._last, None
        if last is None:
            return
        self._first = self._first or last
        self._steps.add(last, is_token=self.is_last_a_token)


def _hop_parts(timing: "HopTiming", scale: float) -> list[float]:
    """Return one hop's times; what a node says of itself is bounded by what the client saw."""
    compute_s = min(max(0.0, timing.compute_s), timing.total_s)
    queue_s = min(max(0.0, timing.queue_s), timing.total_s - compute_s)
    return [queue_s * scale, compute_s * scale, (timing.total_s - compute_s - queue_s) * scale, 0.0, 0.0]


def _add(parts: list[float], more: Sequence[float]) -> None:
    for index, seconds in enumerate(more):
        parts[index] += seconds
