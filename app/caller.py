"""Who asks the site for something: built once for each request and each socket, and handed along."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.api_keys import ApiKey

CALLER = "umbel.caller"
"""Where a WSGI environment has its `Caller`, once the request was let in."""


@dataclass(frozen=True, slots=True)
class Caller:
    """`address` is the reader's, as far as the configured proxies tell it."""

    address: str
    api_key: ApiKey | None = None
    widget_key: str | None = None
    """The key of the embedded chat that asks."""

    @property
    def key_id(self) -> str | None:
        """Of the key that what happens is counted for; None for nobody's."""
        return self.widget_key if self.api_key is None else self.api_key.id


def caller_of(environ: Mapping[str, Any]) -> Caller:
    """Return who sends a request. Before it was let in, and in tests without a site, that is an address alone."""
    found = environ.get(CALLER)
    return found if isinstance(found, Caller) else Caller(str(environ.get("REMOTE_ADDR") or ""))
