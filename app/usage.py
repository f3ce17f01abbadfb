"""What was used, by day of UTC, key and model: numbers alone, no text and no address.

Answers are counted in memory, and written now and then by the keeper's thread (`app/keeper.py`) and at the end of the
process. While the database is away they wait, up to a number of rows; a process that is killed loses some seconds.
"""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from sqlalchemy import Connection, delete, select
from sqlalchemy.dialects import postgresql, sqlite

from app.database import Database
from app.errors import DatabaseUnavailableError
from app.tables import usage

logger = logging.getLogger(__name__)

FLUSH_S = 10.0
DAY_S = 86_400
KEPT_DAYS = 400  # a year and a month, to compare with
MAX_WAITING = 10_000  # rows; a day of 1,000 keys with a few models


@dataclass(frozen=True, slots=True)
class Amount:
    """What was used. `errors` are answers that ended by one, among the requests."""

    requests: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    errors: int = 0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(*map(sum, zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What a key used of a model on a day, in days since 1970; `key_id` empty for nobody's."""

    day: int
    key_id: str
    model: str
    amount: Amount


class UsageBook:
    """Any thread, several processes."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._waiting: dict[tuple[int, str, str], Amount] = {}
        self._flushing = threading.Lock()
        self._cleared_day = 0
        self._is_failing = False

    def count(self, key_id: str | None, model: str, amount: Amount) -> None:
        """Count what an answer used. Waits for nobody and raises nothing."""
        place = (int(time.time() // DAY_S), key_id or "", model)
        with self._lock:
            if place in self._waiting or len(self._waiting) < MAX_WAITING:
                self._waiting[place] = self._waiting.get(place, Amount()) + amount

    def flush(self) -> None:
        """Write what was counted; what cannot be written waits, which is logged once. Any thread.

        What is nobody's alone does not make a database.
        """
        with self._flushing:
            if not self._database.exists:
                return
            with self._lock:
                waiting, self._waiting = self._waiting, {}
            if not waiting:
                return
            try:
                with self._database.writing() as connection:
                    self._write(connection, waiting)
            except DatabaseUnavailableError:
                self._put_back(waiting)
                return
            self._is_failing = False

    def _put_back(self, waiting: dict[tuple[int, str, str], Amount]) -> None:
        with self._lock:
            for place, amount in waiting.items():
                if place in self._waiting or len(self._waiting) < MAX_WAITING:
                    self._waiting[place] = self._waiting.get(place, Amount()) + amount
            num_waiting = len(self._waiting)
        if not self._is_failing:
            logger.warning("usage cannot be written: %d rows wait, at most %d are kept", num_waiting, MAX_WAITING)
        self._is_failing = True

    def _write(self, connection: Connection, waiting: dict[tuple[int, str, str], Amount]) -> None:
        insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
        # In one order, so that processes that write the same rows wait for each other instead of in a circle.
        for (day, key_id, model), amount in sorted(waiting.items()):
            row = insert(usage).values((day, key_id, model, *astuple(amount)))
            sums = {name: usage.c[name] + row.excluded[name] for name in Amount.__slots__}
            connection.execute(row.on_conflict_do_update(index_elements=["day", "key_id", "model"], set_=sums))
        today = int(time.time() // DAY_S)
        if today != self._cleared_day:
            connection.execute(delete(usage).where(usage.c.day < today - KEPT_DAYS))
            self._cleared_day = today

    def rows(self, days: int, key_id: str | None = None) -> Sequence[UsageRow]:
        """Return what was used on the last days, today among them: of one key, or of all for None. Oldest first.

        Raises DatabaseUnavailableError.
        """
        first = int(time.time() // DAY_S) - days + 1
        wanted = usage.c.day >= first if key_id is None else (usage.c.day >= first) & (usage.c.key_id == key_id)
        query = select(usage).where(wanted).order_by(usage.c.day, usage.c.key_id, usage.c.model)
        with self._database.reading() as connection:
            found = [] if connection is None else connection.execute(query).all()
        return [UsageRow(day, key, model, Amount(*amount)) for day, key, model, *amount in found]
