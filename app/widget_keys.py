"""Widget keys: who may embed the chat, with which model, prompt and limits. They are in the site's database.

A key stands in the source of public pages: it is an identifier and no secret. What is changed holds in every process
within `FRESH_S`.
"""

import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from sqlalchemy import Row, insert, select, update

from app.database import Database
from app.fresh import FRESH_S, Fresh
from app.key_usage import Quota
from app.security import normal_origin
from app.tables import widget_keys
from swarm_protocol.errors import ConfigError

__all__ = ["FRESH_S", "THEMES", "WidgetKey", "WidgetKeys"]

THEMES = ("auto", "light", "dark")


@dataclass(frozen=True, slots=True)
class WidgetKey:
    """What one key allows. None is no choice of a model, and no limit; `created_at` is in seconds since 1970."""

    key: str
    name: str
    origins: tuple[str, ...]
    model: str | None
    system_prompt: str
    theme: str
    requests_per_minute: int | None
    tokens_per_day: int | None
    is_enabled: bool
    created_at: float

    @property
    def quota(self) -> Quota:
        """What all its readers together may use."""
        return Quota(self.key, self.requests_per_minute, self.tokens_per_day, who="this chat")


def _checked(key: WidgetKey) -> WidgetKey:
    """Return a key with its origins as browsers write them. Raises ConfigError."""
    origins = [normal_origin(origin) for origin in key.origins]
    if not origins or None in origins:
        raise ConfigError(
            f"origins {list(key.origins)} of {key.name!r}: one or more of scheme://host[:port] are needed"
        )
    if key.theme not in THEMES:
        raise ConfigError(f"theme {key.theme!r} of {key.name!r} is none of {', '.join(THEMES)}")
    for limit in (key.requests_per_minute, key.tokens_per_day):
        if limit is not None and limit < 1:
            raise ConfigError(f"limit {limit} of {key.name!r} is below 1; leave it out for none")
    return replace(key, origins=tuple(origin for origin in origins if origin is not None))


_COLUMNS = [widget_keys.c[name] for name in WidgetKey.__slots__]


def _key_of(row: Row[*tuple[object, ...]]) -> WidgetKey:
    values = row._asdict()
    return WidgetKey(**{**values, "origins": tuple(values["origins"].split())})


class WidgetKeys:
    """The keys of a site. Any thread, several processes."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._found: Fresh[str, WidgetKey | None] = Fresh(self._read)

    def _read(self, key: str) -> WidgetKey | None:
        with self._database.reading() as connection:
            if connection is None:
                return None
            row = connection.execute(select(*_COLUMNS).where(widget_keys.c.key == key)).one_or_none()
        return None if row is None else _key_of(row)

    def find(self, key: str) -> WidgetKey | None:
        """Return a key, which may be disabled. Raises DatabaseUnavailableError."""
        return self._found.get(key)

    def list(self) -> tuple[WidgetKey, ...]:
        """Return all keys, the oldest first. Raises DatabaseUnavailableError."""
        with self._database.reading() as connection:
            if connection is None:
                return ()
            order = (widget_keys.c.created_at, widget_keys.c.key)
            return tuple(map(_key_of, connection.execute(select(*_COLUMNS).order_by(*order))))

    def create(
        self,
        *,
        name: str,
        origins: Sequence[str],
        model: str | None = None,
        system_prompt: str = "",
        theme: str = "auto",
        requests_per_minute: int | None = None,
        tokens_per_day: int | None = None,
    ) -> WidgetKey:
        """Make a key and keep it. Raises ConfigError for what no key can have, and DatabaseUnavailableError."""
        name_of_key = f"wk_{secrets.token_hex(8)}"
        key = _checked(
            WidgetKey(
                name_of_key, name, tuple(origins), model, system_prompt, theme, requests_per_minute, tokens_per_day,
                True, time.time(),
            )
        )  # fmt: skip
        with self._database.writing() as connection:
            connection.execute(insert(widget_keys), {**asdict(key), "origins": " ".join(key.origins)})
        self._found.forget()
        return key

    def revoke(self, key: str) -> bool:
        """Let a key be used no more; return whether there was one. Raises DatabaseUnavailableError."""
        with self._database.writing() as connection:
            changed = connection.execute(update(widget_keys).where(widget_keys.c.key == key).values(is_enabled=False))
        self._found.forget()
        return changed.rowcount > 0
