"""The client at the other end of an HTTP request, seen through gunicorn's socket without taking anything from it."""

import contextlib
import select
import socket
from collections.abc import Mapping
from typing import Any

from app.caller import caller_of

MAX_KEY_CHARS = 256


class PeerGoneError(Exception):
    """The client of a request closed its connection, or takes nothing any more."""


class HttpPeer:
    """Belongs to the request's thread. Without gunicorn, as in tests, a client never goes."""

    def __init__(self, environ: Mapping[str, Any]) -> None:
        found = environ.get("gunicorn.socket")
        self._sock = found if isinstance(found, socket.socket) else None
        key = str(environ.get("HTTP_IDEMPOTENCY_KEY", ""))[:MAX_KEY_CHARS]
        # One client's keys are not another's: who guesses one must not end somebody else's answer.
        self.caller = caller_of(environ)
        self.request_key = (self.caller.address, self.caller.key_id, environ.get("PATH_INFO"), key) if key else None
        """By which the client knows its request, if it sends it again; None without."""

    @property
    def can_be_seen(self) -> bool:
        """Whether it can be told that the client leaves."""
        return self._sock is not None

    def is_gone(self) -> bool:
        """Return whether the client closed its connection."""
        if self._sock is None:
            return False
        try:
            if not self._poll(select.POLLIN, 0.0):
                return False
            return not self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except (OSError, ValueError):
            return True

    def wait_writable(self, timeout_s: float) -> None:
        """Wait until a piece can be sent without blocking; ends the connection of a client that takes nothing.

        Raises PeerGoneError then.
        """
        if self._sock is None:
            return
        with contextlib.suppress(OSError, ValueError):
            if self._poll(select.POLLOUT, timeout_s):
                return
        self.drop()
        raise PeerGoneError

    def drop(self) -> None:
        """Break the connection off, so that the client does not take what it has for all of it."""
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def _poll(self, what: int, timeout_s: float) -> bool:
        assert self._sock is not None
        poller = select.poll()  # select.select() fails for descriptors from 1024 on
        poller.register(self._sock.fileno(), what)
        return bool(poller.poll(timeout_s * 1000))
