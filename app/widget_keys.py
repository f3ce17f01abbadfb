"""Widget keys: who may embed the chat, with which model, prompt and limits. The operator keeps them in a file.

A key stands in the source of public pages: it is an identifier and no secret. Whoever changes the file changes what the
site does with the next request: it is read again when it was written.
"""

import json
import logging
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from app.security import normal_origin
from swarm_protocol.errors import ConfigError

logger = logging.getLogger(__name__)

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


def _read(path: Path) -> dict[str, WidgetKey]:
    """Return the keys of a file. Raises ConfigError when it is none of ours."""
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, list):
            raise TypeError("a list is expected")
        keys = [_checked(WidgetKey(**{**values, "origins": tuple(values["origins"])})) for values in found]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is no file of widget keys: {error}") from None
    return {key.key: key for key in keys}


class WidgetKeys:
    """The keys of a site. Any thread; several processes may read one file, and one at a time change it."""

    def __init__(self, path: Path | None = None) -> None:
        """`path` None keeps keys for as long as the process lives. Raises ConfigError for a file of something else."""
        self._path = path
        self._lock = threading.Lock()
        self._keys: dict[str, WidgetKey] = {}
        self._version: tuple[int, int] | None = None
        self._load(is_first=True)

    def _load(self, *, is_first: bool = False) -> None:
        """Read the file if it is another one than last time. Called by one thread at a time."""
        if self._path is None:
            return
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            self._keys, self._version = {}, None
            return
        version = (status.st_mtime_ns, status.st_ino)
        if version == self._version:
            return
        self._version = version
        try:
            self._keys = _read(self._path)
        except ConfigError as error:
            if is_first:
                raise
            logger.error("widget keys stay as they were: %s", error)

    def _save(self, keys: dict[str, WidgetKey]) -> None:
        self._keys = keys
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps([asdict(key) for key in keys.values()], indent=2)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=self._path.parent, delete=False) as file:
            file.write(text)
        os.chmod(file.name, 0o644)  # the site may run as another user; nothing in it opens anything
        os.replace(file.name, self._path)  # a reader finds the old file or the new one, and never half of one

    def find(self, key: str) -> WidgetKey | None:
        """Return a key, which may be disabled."""
        with self._lock:
            self._load()
            return self._keys.get(key)

    def list(self) -> tuple[WidgetKey, ...]:
        """Return all keys, the oldest first."""
        with self._lock:
            self._load()
            return tuple(self._keys.values())

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
        """Make a key and keep it. Raises ConfigError for what no key can have."""
        name_of_key = f"wk_{secrets.token_hex(8)}"
        key = _checked(
            WidgetKey(
                name_of_key, name, tuple(origins), model, system_prompt, theme, requests_per_minute, tokens_per_day,
                True, round(time.time()),
            )
        )  # fmt: skip
        with self._lock:
            self._load()
            self._save({**self._keys, key.key: key})
        return key

    def revoke(self, key: str) -> bool:
        """Let a key be used no more; return whether there was one."""
        with self._lock:
            self._load()
            found = self._keys.get(key)
            if found is not None:
                self._save({**self._keys, key: replace(found, is_enabled=False)})
            return found is not None
