"""What the site shows of the swarm: made of what its swarm client knows anyway, at most every few seconds."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from app.generation_queue import GenerationQueue
from app.model_registry import ModelRegistry, OpenedModel
from app.swarm_history import HistoryReport, Run, history_report, recent_speed
from app.swarm_report import Circumstances, ModelReport, model_report
from swarm_protocol.errors import SwarmError

logger = logging.getLogger(__name__)

REPORT_AGE_S = 5.0
"""How old a report may be; the client reads the directory as often."""

RunsOf = Callable[[str], Sequence[Run]]
"""Returns the test answers of a model in the last month."""


@dataclass(frozen=True, slots=True)
class SwarmReport:
    """All models at a time, in seconds since the epoch, each with its history; None where nothing was measured.

    `took_s` is how long the swarm was looked at.
    """

    at: float
    took_s: float
    models: tuple[ModelReport, ...]
    histories: tuple[HistoryReport | None, ...]

    def find(self, name: str | None) -> ModelReport | None:
        """Return the model called `name`; without a name the first one."""
        return next((model for model in self.models if name in (None, "", model.name)), None)


class SwarmBoard:
    """Keeps the last report. Any thread."""

    def __init__(
        self,
        models: ModelRegistry,
        queue: GenerationQueue,
        version: str,
        runs_of: RunsOf = lambda _: (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`version` is the site's, with which nodes' are compared."""
        self._models, self._queue, self._version = models, queue, version
        self._runs_of, self._clock = runs_of, clock
        self._making = threading.Lock()
        self._last: SwarmReport | None = None

    def report(self) -> SwarmReport:
        """Return a report that is hardly older than `REPORT_AGE_S`: while one thread makes it, others get the last."""
        last = self._last
        if last is not None and 0 <= self._clock() - last.at < REPORT_AGE_S:
            return last
        if not self._making.acquire(blocking=last is None):
            assert last is not None
            return last
        try:
            newest = self._last
            if newest is None or newest is last:
                newest = self._last = self._make()
            return newest
        finally:
            self._making.release()

    def forget(self) -> None:
        """Have the next report made anew, as after something changed that is known here."""
        self._last = None

    def _make(self) -> SwarmReport:
        now = self._clock()
        models, histories = [], []
        for opened in self._models.opened():
            runs = self._runs_of(opened.name)
            models.append(self._model(opened, recent_speed(runs, now)))
            histories.append(history_report(runs, now) if runs else None)
        return SwarmReport(now, max(0.0, self._clock() - now), tuple(models), tuple(histories))

    def _model(self, opened: OpenedModel, measured: float | None) -> ModelReport:
        model = opened.model
        if model is None:
            return ModelReport(opened.name, "failed" if opened.status == "failed" else "loading")
        try:
            swarm = model.swarm()
        except SwarmError as error:
            logger.warning("cannot tell who serves model=%s: %s", model.name, error)
            return ModelReport(model.name, "unknown", model.max_length)
        circumstances = Circumstances(model.max_length, self._queue.num_waiting, measured, self._version)
        return model_report(swarm, model.block_size, circumstances)
