"""Pure: whether decode steps that wait are held for others that are about to come.

Sessions that decode together get their outputs in one burst, but their next steps come one after the other: each goes
through its client's head first. If the device began with the first of them alone, it would take nearly as long as with
all, and the others would wait for it: the sessions fall apart into groups that take turns. So, when the device is idle:

    - Steps that wait are held for sessions that answered lately and mostly come back soon: each one's time between
      output and next step is averaged.
    - Only for those whose way back is short against a step. A longer way is better used to run a step of others in
      between: so sessions over a slow network make nobody wait, nor do those whose route goes on to another node.
    - At most `HOLD_SHARE` of the last batch's time, and no longer than all of them should have taken. Whoever is late
      is not waited for any more, so a session that ends costs the others one hold.
    - A session that has no company is never held.
"""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

HOLD_SHARE = 0.5
"""Of the last batch's time. A batch of one takes about half as long as one of eight (2 cores, float32), so holding its
row for less is a gain for all of them, that row included, which would have waited for the others' batch next."""

MAX_HOLD_S = 0.05
"""What nobody notices between two words, whatever a batch takes."""

LATE = 1.5
"""A session is late after so many times its usual way back."""

_SLACK_S = 0.001
_NEWEST_SHARE = 0.25
_PAUSE_S = 1.0
_FORGET_S = 60.0


@dataclass(slots=True)
class _Seen:
    """`away_s` is how long the session mostly takes to come back; None if it never did. `left_s` None: it is here."""

    group: Hashable
    changed_s: float
    away_s: float | None = None
    left_s: float | None = None


class Gathering:
    """Remembers when sessions come and go. Its times are of one clock, whichever."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, _Seen] = {}
        self._batch_s = 0.0
        self._ended_s = 0.0

    def arrived(self, session: Hashable, group: Hashable, now_s: float) -> None:
        """Note that a decode step of `session` waits from now on. Only steps of one `group` can run together."""
        seen = self._seen.setdefault(session, _Seen(group, now_s))
        if seen.left_s is not None and now_s - seen.left_s < _PAUSE_S:  # else somebody thought about a question
            away_s = now_s - seen.left_s
            old_s = away_s if seen.away_s is None else seen.away_s
            seen.away_s = old_s + _NEWEST_SHARE * (away_s - old_s)
        seen.group, seen.changed_s, seen.left_s = group, now_s, None

    def answered(self, sessions: Iterable[Hashable], batch_s: float, now_s: float) -> None:
        """Note that decode steps of `sessions` are through, by a batch that took `batch_s`."""
        self._batch_s, self._ended_s = batch_s, now_s
        for session in sessions:
            if session in self._seen:
                self._seen[session].left_s = self._seen[session].changed_s = now_s
        self._seen = {key: seen for key, seen in self._seen.items() if now_s - seen.changed_s < _FORGET_S}

    def hold_s(self, waiting: Mapping[Hashable, float], now_s: float) -> float:
        """Return how long to hold the steps of the sessions in `waiting`, with their times of arrival; 0.0: run now."""
        longest_s = min(MAX_HOLD_S, HOLD_SHARE * self._batch_s)
        groups = {self._seen[session].group for session in waiting if session in self._seen}
        late_s = [
            seen.left_s + LATE * seen.away_s + _SLACK_S
            for session, seen in self._seen.items()
            if session not in waiting and seen.group in groups and seen.left_s is not None
            if seen.away_s is not None and seen.away_s <= longest_s
        ]
        # Those that are late already are not counted on; the hold begins when there is a step and the device is free.
        began_s = max(self._ended_s, min(waiting.values(), default=now_s))
        end_s = min(began_s + longest_s, max((at_s for at_s in late_s if at_s > now_s), default=now_s))
        return max(0.0, end_s - now_s)
