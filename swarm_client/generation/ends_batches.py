"""Pure: which rows go through a model's head together, and how long those that wait are held for others.

Rules:

    - Rows of one model run together, the oldest first, up to `MAX_ROWS`. The oldest row of all chooses the model.
    - Sessions whose steps were one batch at a node come back in a burst, one after the other. So rows wait for those
      that should be there any moment: the sessions that got their last token about as long ago as one that is back.
    - They wait at most for a share of what the last batch took, and not at all for sessions that are long overdue:
      those have ended, or their route is slower. A session that has no company is never held.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

MAX_ROWS = 64
"""In one batch: logits of 64 rows of BLOOM's vocabulary, 250,880 tokens, take 64 MB in float32."""

HOLD_SHARE = 0.25
"""Of what the last batch took. One row through the head of SmolLM2 takes 7 ms and eight take 9 (2 cores, float32), so
running two batches instead of one costs more than the wait."""

MAX_HOLD_S = 0.005
"""The end of a burst of 16 replies comes within 3 ms of its beginning."""

AWAY_LEAST, AWAY_MOST = 0.7, 1.5
"""How long a session has been away, as a share of how long one that is back has been, for it to be expected now."""

_FORGET_S = 60.0


@dataclass(frozen=True, slots=True)
class Row:
    """A row that waits. `session` tells it from others; rows of equal `model` can be computed in one forward."""

    session: Hashable
    model: Hashable
    arrived_s: float


class EndsBatches:
    """Chooses batches; remembers when each session got its last token. Belongs to the worker's thread."""

    def __init__(self) -> None:
        self._left_s: dict[Hashable, float] = {}
        self._batch_s = 0.0

    def hold_until_s(self, waiting: Sequence[Row]) -> float:
        """Return until when the rows of `waiting`, in order of arrival, should be held; the past if not at all."""
        first = waiting[0]
        end_s = first.arrived_s + min(MAX_HOLD_S, HOLD_SHARE * self._batch_s)
        here = {row.session for row in waiting}
        away = [(session, left_s) for session, left_s in self._left_s.items() if session not in here]
        for row in waiting:
            left_s = self._left_s.get(row.session)
            if left_s is None:
                continue
            own_s = row.arrived_s - left_s
            if any(AWAY_LEAST * own_s <= row.arrived_s - other_s <= AWAY_MOST * own_s for _, other_s in away):
                return end_s
        return first.arrived_s

    def choose(self, waiting: Sequence[Row]) -> tuple[int, ...]:
        """Return the indices of those rows of `waiting` that run next."""
        chosen = [index for index, row in enumerate(waiting) if row.model == waiting[0].model]
        return tuple(chosen[:MAX_ROWS])

    def ran(self, sessions: Iterable[Hashable], batch_s: float, now_s: float) -> None:
        """Note that these sessions have their tokens, by a batch that took `batch_s`."""
        self._batch_s = batch_s
        for session in sessions:
            self._left_s[session] = now_s
        self._left_s = {session: left_s for session, left_s in self._left_s.items() if now_s - left_s < _FORGET_S}
