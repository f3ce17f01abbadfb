"""The id of what a thread does for a client: in the log beside every line, in the header of an answer, in its errors.

An HTTP request has one, taken from its client if it is well formed. A websocket has one, too, and each answer on it the
same with its number behind: `5f2c…-3`.
"""

import itertools
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

HEADER = "X-Request-ID"
_WELL_FORMED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{3,63}")  # what nobody can break a log line or a header with


class _Scope:
    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.numbers = itertools.count(1)


_scope: ContextVar[_Scope | None] = ContextVar("umbel_request", default=None)


def chosen_id(asked: str | None) -> str:
    """Return the id of a new request: the one that its client names, or one made here."""
    return asked if asked and _WELL_FORMED.fullmatch(asked) else secrets.token_hex(8)


def current_id() -> str | None:
    """Return the id of what this thread is doing; None outside of any request."""
    scope = _scope.get()
    return None if scope is None else scope.request_id


def answer_id() -> str:
    """Return an id for the next answer of this thread's connection."""
    scope = _scope.get()
    return secrets.token_hex(8) if scope is None else f"{scope.request_id}-{next(scope.numbers)}"


def enter(request_id: str) -> None:
    """Have this thread work under an id until `leave`."""
    _scope.set(_Scope(request_id))


def leave() -> None:
    """Have this thread work for nobody."""
    _scope.set(None)


@contextmanager
def working(request_id: str) -> Iterator[None]:
    """Have this thread work under an id inside. For threads that a request starts."""
    before = _scope.set(_Scope(request_id))
    try:
        yield
    finally:
        _scope.reset(before)
