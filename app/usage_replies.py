"""What `GET /api/v2/usage` answers."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict

from app.api_keys import ApiKey
from app.usage import DAY_S, UsageRow


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid")


class UsageDay(_Shape):
    """What a key used of one model on one day of UTC."""

    date: str
    model: str
    requests: int
    prompt_tokens: int
    answer_tokens: int
    errors: int


class UsageLimits(_Shape):
    """What the key allows; null is no limit."""

    requests_per_minute: int | None
    tokens_per_day: int | None
    sessions: int | None


class UsageReply(_Shape):
    """The usage of the key that asks, the oldest day first. Times are in seconds since 1970."""

    key: str
    name: str
    expires_at: float | None
    limits: UsageLimits
    days: list[UsageDay]


def date_of(day: int) -> str:
    """Return a number of days since 1970 as a date."""
    return datetime.fromtimestamp(day * DAY_S, UTC).strftime("%Y-%m-%d")


def usage_reply(key: ApiKey, rows: Sequence[UsageRow]) -> UsageReply:
    """Return the answer for one key."""
    return UsageReply(
        key=key.id,
        name=key.name,
        expires_at=key.expires_at,
        limits=UsageLimits(
            requests_per_minute=key.requests_per_minute, tokens_per_day=key.tokens_per_day, sessions=key.sessions
        ),
        days=[UsageDay(date=date_of(row.day), model=row.model, **asdict(row.amount)) for row in rows],
    )
