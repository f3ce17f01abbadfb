"""How the site's own test answers went in the last month: in an SQLite file, or in memory where none is named."""

import logging
import sqlite3
import threading
import weakref
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from app.swarm_history import MONTH_S
from swarm_protocol.errors import ConfigError

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the tables, in the file's `user_version`."""

_TABLES = """
CREATE TABLE IF NOT EXISTS canary_runs (
    model TEXT NOT NULL,
    started_at REAL NOT NULL,
    outcome TEXT NOT NULL,
    first_token_s REAL,
    tokens_per_s REAL,
    min_replicas INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS canary_runs_by_time ON canary_runs (model, started_at);
"""


@dataclass(frozen=True, slots=True)
class CanaryRun:
    """One test answer. `outcome` is `ok` or an error's code, `started_at` in seconds since the epoch."""

    model: str
    started_at: float
    outcome: str
    first_token_s: float | None
    tokens_per_s: float | None
    min_replicas: int


class CanaryHistory:
    """The runs. Any thread; processes may share a file."""

    def __init__(self, path: str = "") -> None:
        """Raises ConfigError if the file cannot be used."""
        self._lock = threading.Lock()
        try:
            self._db = _opened(path)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"the history file {path!r} cannot be used: {error}") from None
        # A site is never closed as a whole: its file is, when nobody has it any more.
        self._closing = weakref.finalize(self, self._db.close)

    def add(self, run: CanaryRun) -> None:
        """Keep a run, and forget those that are older than a month. What cannot be written is logged."""
        try:
            with self._lock, self._db:
                self._db.execute("INSERT INTO canary_runs VALUES (?, ?, ?, ?, ?, ?)", astuple(run))
                self._db.execute("DELETE FROM canary_runs WHERE started_at < ?", (run.started_at - MONTH_S,))
        except sqlite3.Error as error:
            logger.warning("a test answer could not be kept: %s", error)

    def since(self, model: str, started_at: float) -> Sequence[CanaryRun]:
        """Return the runs of a model from `started_at` on, in order; none if they cannot be read, which is logged."""
        try:
            with self._lock:
                rows = self._db.execute(
                    "SELECT * FROM canary_runs WHERE model = ? AND started_at >= ? ORDER BY started_at",
                    (model, started_at),
                ).fetchall()
        except sqlite3.Error as error:
            logger.warning("test answers could not be read: %s", error)
            return []
        return [CanaryRun(*row) for row in rows]

    def forget(self, model: str) -> None:
        """Drop the runs of a model."""
        with self._lock, self._db:
            self._db.execute("DELETE FROM canary_runs WHERE model = ?", (model,))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._closing()


def _opened(path: str) -> sqlite3.Connection:
    if path:
        Path(path).expanduser().parent.mkdir(parents=True, exist_ok=True)
    # One connection for all threads, each of which holds the lock while it uses it.
    db = sqlite3.connect(str(Path(path).expanduser()) if path else ":memory:", check_same_thread=False)
    try:
        found = db.execute("PRAGMA user_version").fetchone()[0]
        if found not in (0, VERSION):
            raise sqlite3.DatabaseError(f"it is of version {found}, this program reads version {VERSION}")
        if path:
            db.execute("PRAGMA journal_mode=WAL")
        db.executescript(_TABLES)
        db.execute(f"PRAGMA user_version = {VERSION}")
        db.commit()
    except BaseException:
        db.close()
        raise
    return db
