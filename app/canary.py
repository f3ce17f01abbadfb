"""The site's own test answers: now and then a short one of each model, when nobody waits, and how it went.

No text of them is kept. A model of whose blocks some are in no record is not asked: that is the outcome.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence

from app.canary_history import CanaryHistory, CanaryRun
from app.config import StatusConfig
from app.generation_queue import GenerationQueue
from app.model_registry import ModelRegistry
from app.swarm_board import SwarmReport
from app.swarm_history import MONTH_S, OK
from swarm_client.generation.text_session import SamplingParams, TextModel, TextSession
from swarm_protocol.errors import SwarmError

logger = logging.getLogger(__name__)

PROMPT = "The parts of a flower are"
PROMPT_TOKENS = 64  # what the prompt takes at most, with whatever a tokenizer adds
TIMEOUT_S = 90.0  # a person would have left; finding no node takes 30 s of it
FIRST_S = 30.0  # after the start: whoever opened the site for the first time chats first
TICK_S = 2.0


def is_due(last_at: float | None, began_at: float, now: float, period_s: float, *, is_busy: bool) -> bool:
    """Return whether a model is to be asked now: `last_at` it was last, None for never.

    While people wait for answers it is put off, at most for another period: else a busy site would have no history.
    """
    since_s = now - (began_at + FIRST_S - period_s if last_at is None else last_at)
    return since_s >= (2 * period_s if is_busy else period_s)


class Canary:
    """Asks the models of a site, one after the other, in a thread of its own."""

    def __init__(
        self,
        models: ModelRegistry,
        queue: GenerationQueue,
        history: CanaryHistory,
        report: Callable[[], SwarmReport],
        config: StatusConfig,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._models, self._queue, self._history = models, queue, history
        self._report, self._config, self._clock = report, config, clock
        self._began_at = clock()

    def start(self, is_ending: Callable[[], bool]) -> None:
        """Ask from now on, until `is_ending`. Does nothing where the period is 0."""
        if self._config.canary_s > 0:
            threading.Thread(target=self._run, args=(is_ending,), name="canary", daemon=True).start()

    def _run(self, is_ending: Callable[[], bool]) -> None:
        while not is_ending():
            try:
                self.ask_due(is_ending)
            except Exception:
                logger.exception("no test answer could be made")
            time.sleep(TICK_S)

    def ask_due(self, is_ending: Callable[[], bool] = lambda: False) -> None:
        """Ask the models whose turn it is, in this thread."""
        for opened in self._models.opened():
            if opened.model is not None and not is_ending() and self._is_due(opened.name):
                run = self._ask(opened.model)
                if not is_ending():  # its answers are cut off then
                    logger.info("test answer model=%s outcome=%s", run.model, run.outcome)
                    self._history.add(run)

    def _is_due(self, name: str) -> bool:
        now, period_s = self._clock(), self._config.canary_s
        runs = self._history.since(name, now - 2 * period_s)
        last_at = max((run.started_at for run in runs), default=None)
        is_busy = self._queue.num_running > 0 or self._queue.num_waiting > 0
        return is_due(last_at, self._began_at, now, period_s, is_busy=is_busy)

    def _ask(self, model: TextModel) -> CanaryRun:
        started_at = self._clock()
        report = self._report().find(model.name)
        min_replicas = report.min_replicas if report else 0
        try:
            # Going by the records alone: a node that did not answer a ping is tried, as it would be for a person.
            if model.missing_blocks():
                return CanaryRun(model.name, started_at, "missing_blocks", None, None, min_replicas)
            first_token_s, tokens_per_s = timed_answer(model, self._config.canary_tokens)
        except SwarmError as error:
            return CanaryRun(model.name, started_at, error.code, None, None, min_replicas)
        except Exception:
            logger.exception("bug in a test answer model=%s", model.name)
            return CanaryRun(model.name, started_at, "internal_error", None, None, min_replicas)
        return CanaryRun(model.name, started_at, OK, first_token_s, tokens_per_s, min_replicas)


def timed_answer(model: TextModel, num_tokens: int, timeout_s: float = TIMEOUT_S) -> tuple[float, float | None]:
    """Generate; return the seconds until the first token, and the tokens/s behind it, None where only one came.

    Raises SwarmError, with the code `timeout` when it took too long.
    """
    session = model.open_session(min(model.max_length, num_tokens + PROMPT_TOKENS))
    is_late = threading.Event()

    def give_up() -> None:
        is_late.set()
        session.cancel()

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        times = _token_times(session, num_tokens)
    finally:
        timer.cancel()
        session.close()
    if is_late.is_set() or len(times) < 2:
        raise CanaryTimeoutError(timeout_s)
    took_s = times[-1] - times[1]
    return times[1] - times[0], (len(times) - 2) / took_s if took_s > 0 else None


class CanaryTimeoutError(SwarmError):
    """A test answer did not come in time."""

    code, retryable = "timeout", True

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"no answer within {timeout_s:g} s")


def _token_times(session: TextSession, num_tokens: int) -> list[float]:
    """Return when the generation began, and when each of its tokens came."""
    session.append_text(PROMPT)
    times = [time.monotonic()]
    params = SamplingParams(max_new_tokens=num_tokens, stop_at_eos=False)
    for delta in session.generate(params):
        times += [time.monotonic()] * len(delta.token_ids)
    return times


def runs_of(history: CanaryHistory, clock: Callable[[], float] = time.time) -> Callable[[str], Sequence[CanaryRun]]:
    """Return what gives the board a model's last month."""
    return lambda name: history.since(name, clock() - MONTH_S)
