"""Answers that readers report to those who run the site: a reason, and the conversation's text only if they agreed.

No address is kept, and nothing for longer than `UMBEL_REPORTS_DAYS`.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field
from sqlalchemy import Row, delete, insert, select

from app.database import Database
from app.request_models import Fields, Text
from app.tables import reports
from swarm_protocol.errors import LimitExceededError

DAY_S = 86400.0
HOUR_S = 3600.0
HOURLY_PER_ADDRESS, HOURLY = 10, 200  # a person reports one or two; a script could fill the database
MAX_MESSAGES, MAX_CONVERSATION_CHARS = 400, 400_000  # beyond any context

Reason = Literal["harmful", "false", "private", "other"]
REASONS: tuple[Reason, ...] = get_args(Reason)


class ReportedMessage(Fields):
    """One message of a conversation that its reader sends along."""

    role: Literal["system", "user", "assistant"]
    content: Text


def _not_too_long(messages: list[ReportedMessage] | None) -> list[ReportedMessage] | None:
    if messages is not None and sum(len(message.content) for message in messages) > MAX_CONVERSATION_CHARS:
        raise ValueError(f"more than {MAX_CONVERSATION_CHARS} characters")
    return messages


class ReportRequest(Fields):
    """The body of `POST /api/v2/reports`; `conversation` is there only where the reader agreed to send it."""

    reason: Reason
    comment: Annotated[Text, Field(max_length=2000)] = ""
    model: Annotated[Text, Field(max_length=200)] = ""
    conversation: Annotated[
        Annotated[list[ReportedMessage], Field(max_length=MAX_MESSAGES)] | None, AfterValidator(_not_too_long)
    ] = None


@dataclass(frozen=True, slots=True)
class Report:
    """One report as it is kept; `conversation` is None where the reader did not send it."""

    id: int
    created_at: float
    reason: str
    comment: str
    model: str
    request_id: str
    conversation: tuple[tuple[str, str], ...] | None


def _report_of(row: Row[*tuple[object, ...]]) -> Report:
    values = row._asdict()
    text = values.pop("conversation")
    return Report(
        **values, conversation=None if text is None else tuple((role, said) for role, said in json.loads(text))
    )


class ReportRate:
    """How many reports come from where in the last hour. Any thread; forgotten with the process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._last: deque[tuple[float, str]] = deque()

    def count(self, address: str) -> None:
        """Count one. Raises LimitExceededError."""
        with self._lock:
            now_s = self._clock()
            while self._last and now_s - self._last[0][0] >= HOUR_S:
                self._last.popleft()
            from_here = sum(other == address for _, other in self._last)
            if from_here >= HOURLY_PER_ADDRESS or len(self._last) >= HOURLY:
                raise LimitExceededError(f"there were {from_here} reports from here in the last hour; try again later")
            self._last.append((now_s, address))


class Reports:
    """The reports of a site. Any thread, several processes."""

    def __init__(self, database: Database, keep_days: float, clock: Callable[[], float] = time.time) -> None:
        self._database, self._keep_s, self._clock = database, keep_days * DAY_S, clock

    def add(self, asked: ReportRequest, request_id: str) -> None:
        """Keep a report, and drop those that are too old. Raises DatabaseUnavailableError."""
        said = None if asked.conversation is None else [(each.role, each.content) for each in asked.conversation]
        values = {
            "created_at": self._clock(),
            "reason": asked.reason,
            "comment": asked.comment.replace("\0", ""),  # which PostgreSQL does not take
            "model": asked.model.replace("\0", ""),
            "request_id": request_id,
            "conversation": None if said is None else json.dumps(said),
        }
        with self._database.writing() as connection:
            connection.execute(delete(reports).where(reports.c.created_at < self._clock() - self._keep_s))
            connection.execute(insert(reports).values(values))

    def list(self) -> Sequence[Report]:
        """Return all that are not too old, newest first. Raises DatabaseUnavailableError."""
        with self._database.reading() as connection:
            if connection is None:
                return ()
            known = select(reports).where(reports.c.created_at >= self._clock() - self._keep_s)
            return [_report_of(row) for row in connection.execute(known.order_by(reports.c.id.desc()))]

    def find(self, report_id: int) -> Report | None:
        """Return one. Raises DatabaseUnavailableError."""
        return next((report for report in self.list() if report.id == report_id), None)

    def delete(self, report_id: int) -> bool:
        """Delete one; return whether it was there. Raises DatabaseUnavailableError."""
        with self._database.writing() as connection:
            found = connection.execute(delete(reports).where(reports.c.id == report_id))
            return bool(found.rowcount)
