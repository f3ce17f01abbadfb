"""How the site's own test answers went in the last month: in the site's database."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import delete, insert, select

from app.database import Database
from app.errors import DatabaseUnavailableError
from app.swarm_history import MONTH_S
from app.tables import canary_runs

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CanaryRun:
    """One test answer. `outcome` is `ok` or an error's code, `started_at` in seconds since the epoch."""

    model: str
    started_at: float
    outcome: str
    first_token_s: float | None
    tokens_per_s: float | None
    min_replicas: int


_COLUMNS = [canary_runs.c[name] for name in CanaryRun.__slots__]


class CanaryHistory:
    """The runs. Any thread; processes share them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, run: CanaryRun) -> None:
        """Keep a run, and forget those that are older than a month. What cannot be written is logged."""
        try:
            with self._database.writing() as connection:
                connection.execute(insert(canary_runs), asdict(run))
                connection.execute(delete(canary_runs).where(canary_runs.c.started_at < run.started_at - MONTH_S))
        except DatabaseUnavailableError:
            logger.warning("a test answer could not be kept")

    def since(self, model: str, started_at: float) -> Sequence[CanaryRun]:
        """Return the runs of a model from `started_at` on, in order; none if they cannot be read, which is logged."""
        wanted = (canary_runs.c.model == model) & (canary_runs.c.started_at >= started_at)
        try:
            with self._database.reading() as connection:
                if connection is None:
                    return []
                rows = connection.execute(select(*_COLUMNS).where(wanted).order_by(canary_runs.c.started_at)).all()
        except DatabaseUnavailableError:
            logger.warning("test answers could not be read")
            return []
        return [CanaryRun(*row) for row in rows]

    def forget(self, model: str) -> None:
        """Drop the runs of a model. Raises DatabaseUnavailableError."""
        with self._database.writing() as connection:
            connection.execute(delete(canary_runs).where(canary_runs.c.model == model))
