"""Pure: what is guessed of a text before it is computed, and when guessing pays.

A draft is some tokens that may come next. They go round the ring behind the last token, in the same step; the head
then chooses a token at each of them, with the random number of that place, and those of the draft that are the ones
chosen stay. So the text is the one that there would be without drafts, and a step brings one token or more.

Rules:

    - A draft is what followed the last `MATCH_MOST` to `MATCH_LEAST` tokens where they stood before, the latest time:
      prompt lookup, as in transformers' `generate`. Or a draft model is asked for it, which takes its time.
    - Every draft is compared with what came, sent or not. So it costs nothing to see that looked-up drafts begin to be
      right. A draft model that is not asked is tried again each `TRY_EACH` steps, where it could gain something.
    - Both are believed to be right as often as they lately were, each for itself; the one that promises more is taken.
    - A draft is sent only as long as the tokens per second that are to be expected are highest with it, and only if
      they are `GAIN_LEAST` times those without: never where drafts are mostly wrong or a column takes long.
    - Nothing is sent while steps wait for a node's device for `QUEUE_MOST` of what its blocks take: others use it then,
      and more columns would only delay them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from swarm_protocol.errors import ConfigError

if TYPE_CHECKING:  # the site checks its settings before it loads the numeric libraries
    from swarm_client.generation.sampling import TokenChooser

Speculation = Literal["off", "ngram", "draft"]
"""What guesses tokens ahead: nothing, prompt lookup, or prompt lookup and a draft model in turns."""

DRAFT_QUANTIZATIONS = ("none", "int8", "nf4")
"""How a draft model's weights may be held."""

MATCH_LEAST, MATCH_MOST = 2, 4
"""Tokens that must have stood before for a draft to be made. One is mere chance: common words follow anything."""

DRAFT_MOST = 15
"""With the last token it makes 16 columns. Not tuned yet."""

FIRST_LENGTH = 2
"""After a step without a draft. Each next one may be twice as long: a costly column shows with few of them."""

GAIN_LEAST = 1.1
"""Estimates are rough, and a draft that gains nothing still costs bytes and the nodes' time."""

MEMORY = 0.9
"""What a draft weighs after the next one: about ten of them decide, as text changes between prose and quotes."""

FIRST_RIGHT, FIRST_WRONG = 1.0, 2.0
"""What is believed of looked-up drafts before the first one: that one token of three is right."""

MODEL_RIGHT, MODEL_WRONG = 3.0, 2.0
"""What is believed of a draft model: that three tokens of five are right."""

TRY_EACH = 64
"""Steps. A try of `TRY_LENGTH` tokens costs at most one and a half steps where it may gain anything: 2.3 %."""

TRY_LENGTH = 2

HOPE = 0.9
"""As how good a draft model is seen for a try."""

COLUMN_SHARE = 0.1
"""What another column is believed to take of a step of one, before a step with a draft was seen."""

FADE = 0.005
"""By how much a measured cost of a column goes back towards that with each step without a draft, so that one step which
something held up does not end speculation for good."""

QUEUE_MOST = 0.5
"""A step that comes at any time waits for half of the batch that runs. So long a wait on average means that one always
runs. Nodes do not say how many sessions they have."""

QUEUE_MEMORY = 0.8
"""Of that average, with each step."""


def check_speculation(wanted: str) -> Speculation:
    """Return `wanted`. Raises ConfigError if it is none of the choices."""
    for known in get_args(Speculation):
        if wanted == known:
            return wanted  # type: ignore[return-value]
    raise ConfigError(f"speculation {wanted!r} is not known; use {', '.join(get_args(Speculation))}")


def check_draft_quantization(wanted: str) -> None:
    """Raise ConfigError if `wanted` is none of `DRAFT_QUANTIZATIONS`."""
    if wanted not in DRAFT_QUANTIZATIONS:
        raise ConfigError(f"draft_quantization {wanted[:20]!r} is none of {', '.join(DRAFT_QUANTIZATIONS)}")


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a token's step took: `seconds` in all, and `queue_s` and `compute_s` at the node with the longest queue."""

    seconds: float
    queue_s: float = 0.0
    compute_s: float = 0.0


class PromptLookup:
    """Finds what followed the same tokens before, in a list that grows at its end."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        # Behind which tokens stands what, the latest time.
        self._after: dict[tuple[int, ...], int] = {}

    def draft(self, token_ids: Sequence[int], most: int) -> tuple[int, ...]:
        """Return up to `most` tokens that may come behind `token_ids`; none if its end has not been there before."""
        self._follow(token_ids)
        for length in range(min(MATCH_MOST, len(token_ids)), MATCH_LEAST - 1, -1):
            start = self._after.get(tuple(token_ids[-length:]))
            if start is not None:
                return self._going_on(start, most)
        return ()

    def _follow(self, token_ids: Sequence[int]) -> None:
        """Know all of `token_ids` but its end."""
        known = len(self._ids)
        if known > len(token_ids) or self._ids != list(token_ids[:known]):
            self._ids, self._after, known = [], {}, 0
        for end in range(max(1, known), len(token_ids)):
            for length in range(MATCH_LEAST, min(MATCH_MOST, end) + 1):
                self._after[tuple(token_ids[end - length : end])] = end
        self._ids += token_ids[known:]

    def _going_on(self, start: int, most: int) -> tuple[int, ...]:
        """Return what stands from `start` on, and goes on from its own beginning where a text repeats itself."""
        found = self._ids[start : start + most]
        period = len(self._ids) - start
        while len(found) < most:
            found.append(found[len(found) - period])
        return tuple(found)


class StepTimes:
    """What steps take, by the columns that they have more than one. Shared by all that guess for a text."""

    def __init__(self) -> None:
        self.single_s: float | None = None
        self.longest = FIRST_LENGTH
        self._column_share = COLUMN_SHARE
        self._queue_share = 0.0

    @property
    def are_known(self) -> bool:
        """Whether drafts can be weighed, and nobody else keeps the nodes busy."""
        return self.single_s is not None and self._queue_share < QUEUE_MOST

    def stepped(self, num_drafted: int, cost: StepCost) -> None:
        """Learn what a step with so many drafted tokens took. Steps that something disturbed are not told."""
        share = cost.queue_s / cost.compute_s if cost.compute_s > 0 else 0.0
        self._queue_share = QUEUE_MEMORY * self._queue_share + (1 - QUEUE_MEMORY) * min(share, 10 * QUEUE_MOST)
        self.longest = min(DRAFT_MOST, max(FIRST_LENGTH, 2 * num_drafted))
        if not num_drafted:
            # Falls at once and rises slowly: a step is now and then held up, and none is faster than it can be.
            known = cost.seconds if self.single_s is None else self.single_s
            self.single_s = min(cost.seconds, known + 0.1 * (cost.seconds - known))
            self._column_share += FADE * (COLUMN_SHARE - self._column_share)
        elif self.single_s:
            found = max(0.0, cost.seconds / self.single_s - 1.0) / num_drafted
            self._column_share += 0.5 * (found - self._column_share)

    def gain(self, right: float, length: int, token_s: float) -> float:
        """Return the expected tokens of a step with a draft of `length`, over its time in steps without one.

        `right` is the share of tokens that are, `token_s` what one takes to be guessed.
        """
        right = min(right, 0.999)
        guess_share = token_s / self.single_s if self.single_s else 0.0
        return (1 - right ** (length + 1)) / (1 - right) / (1 + (self._column_share + guess_share) * length)


class DraftLength:
    """How much of a draft is to be sent: learns from what came of drafts of one kind."""

    def __init__(self, times: StepTimes, num_right: float = FIRST_RIGHT, num_wrong: float = FIRST_WRONG) -> None:
        self._times = times
        self._right, self._wrong = num_right, num_wrong

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens, up to the first wrong one, that is expected to be right."""
        return self._right / (self._right + self._wrong)

    def best(self, most: int, token_s: float = 0.0) -> tuple[float, int]:
        """Return what the best length of a draft of at most `most` tokens gains, and that length; 0 for none."""
        if not self._times.are_known:
            return 1.0, 0
        lengths = range(1, min(most, self._times.longest) + 1)
        gains = [(self._times.gain(self.acceptance, length, token_s), length) for length in lengths]
        found = max(gains, default=(1.0, 0))
        return found if found[0] >= GAIN_LEAST else (1.0, 0)

    def compared(self, num_right: int, is_wrong: bool) -> None:
        """Learn of a draft of which `num_right` tokens came, and whether another came in the place of the next."""
        self._right = self._right * MEMORY + num_right
        self._wrong = self._wrong * MEMORY + is_wrong


def num_accepted(draft: Sequence[int], chosen: Sequence[int]) -> int:
    """Return how many tokens of `draft` are those that were `chosen` in their places, up to the first that is not."""
    for index, (guessed, token_id) in enumerate(zip(draft, chosen, strict=False)):
        if guessed != token_id:
            return index
    return min(len(draft), len(chosen))


class Drafter(Protocol):
    """A draft model that follows one text. `token_s` is what a guessed token takes."""

    @property
    def token_s(self) -> float: ...

    def is_ready(self, token_ids: Sequence[int]) -> bool:
        """Whether a draft behind `token_ids` can be had now; if not, something may be done so that it can be soon."""

    def draft(self, token_ids: Sequence[int], most: int, chooser: "TokenChooser") -> tuple[int, ...]:
        """Return up to `most` tokens that may come behind `token_ids`, as `chooser` would choose them."""


class Speculator:
    """What one session guesses: makes drafts, and learns what came of them."""

    def __init__(self, drafter: Drafter | None = None) -> None:
        self._drafter = drafter
        self._lookup = PromptLookup()
        self._times = StepTimes()
        self._looked_up = DraftLength(self._times)
        self._asked = DraftLength(self._times, MODEL_RIGHT, MODEL_WRONG)
        self._steps_since_asked = 0
        self._found: tuple[int, ...] = ()
        self._is_asked = False

    def draft(self, token_ids: Sequence[int], most: int, chooser: "TokenChooser") -> tuple[int, ...]:
        """Return what to send behind the end of `token_ids`, at most so many; mostly nothing without a draft model."""
        most = max(0, min(most, DRAFT_MOST))
        self._found = self._lookup.draft(token_ids, most)
        gain, length = self._looked_up.best(len(self._found))
        self._is_asked, self._steps_since_asked = False, self._steps_since_asked + 1
        drafter = self._drafter
        if drafter is not None and most and drafter.is_ready(token_ids):
            asked_gain, num_asked = self._asked.best(most, drafter.token_s)
            if not length and not num_asked and self._is_worth_a_try(drafter.token_s):
                num_asked = min(most, TRY_LENGTH)
            if asked_gain > gain or (num_asked and not length):
                self._is_asked, self._steps_since_asked = True, 0
                return drafter.draft(token_ids, num_asked, chooser)
        return self._found[:length]

    def came(self, draft: Sequence[int], chosen: Sequence[int], cost: StepCost | None) -> None:
        """Learn what was `chosen` in a step with `draft`: the accepted tokens and one more.

        `cost` is None if something disturbed the step.
        """
        if draft:
            _compare(self._asked if self._is_asked else self._looked_up, draft, chosen)
        if self._found and (self._is_asked or not draft):
            _compare(self._looked_up, self._found[: len(chosen)], chosen)
        if cost is not None:
            self._times.stepped(len(draft), cost)

    def _is_worth_a_try(self, token_s: float) -> bool:
        return (
            self._steps_since_asked >= TRY_EACH
            and self._times.are_known
            and self._times.gain(HOPE, TRY_LENGTH, token_s) >= GAIN_LEAST
        )


def _compare(length: DraftLength, draft: Sequence[int], chosen: Sequence[int]) -> None:
    right = num_accepted(draft, chosen)
    length.compared(right, right < len(draft))
