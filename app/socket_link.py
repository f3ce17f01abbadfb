"""A websocket as the chat sees it: frames in, frames out, and word from the reading thread while a step blocks."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from simple_websocket import ConnectionClosed
from wsproto.utilities import LocalProtocolError

from app.config import SocketLimits
from app.limits import CloseCode, FrameRate, is_flood


class SocketGoneError(Exception):
    """The peer is gone, or was sent away: nobody is left to tell anything."""


class FloodError(OSError):
    """Raised in the reading thread to end it; simple-websocket takes an OSError for the end of the connection."""


class SocketLink:
    """Owns one simple-websocket connection. `receive`, `send` and `close` belong to the handler's thread."""

    def __init__(self, ws: Any, limits: SocketLimits) -> None:
        self._ws, self._limits = ws, limits
        self._lock = threading.Lock()
        # Held until a frame is out: a send that finds a close under way would end the connection ahead of its frame.
        self._send_lock = threading.Lock()
        self._interrupt: Callable[[], None] | None = None
        self._woken = threading.Event()
        self._is_flooded = False
        self._rate: FrameRate | None = None
        ws.event.listener = self._on_event
        ws.sock.on_close = self._look

    @property
    def is_gone(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._is_flooded or not self._ws.connected or self._ws.sock.is_closed

    def limit_rate(self) -> None:
        """Take too many frames in a short time for a flood, though each is answered at once."""
        self._rate = FrameRate(self._limits)

    def wake(self) -> None:
        """End the `wait` that runs, or the next one. Any thread."""
        self._woken.set()

    def wait(self, timeout_s: float) -> None:
        """Wait until something arrived, the peer is gone, or `wake` was called; so long at most."""
        self._woken.wait(timeout_s)
        self._woken.clear()

    def receive(self, timeout_s: float) -> str | bytes | None:
        """Return the next frame, or None after `timeout_s` without one. Raises SocketGoneError."""
        if self.is_gone:
            raise SocketGoneError
        try:
            frame: str | bytes | None = self._ws.receive(timeout=timeout_s)
        except ConnectionClosed:
            raise SocketGoneError from None
        self._put_back_if_gone(frame)
        return frame

    def _put_back_if_gone(self, frame: str | bytes | None) -> None:
        """A peer that left wants no answers to what it had sent ahead: raises SocketGoneError."""
        if self.is_gone:
            if frame is not None:
                self._ws.input_buffer.insert(0, frame)
            raise SocketGoneError

    @property
    def unread(self) -> tuple[str | bytes, ...]:
        """What came just before the peer left, and was not received."""
        return tuple(self._ws.input_buffer)

    def send(self, frame: str) -> None:
        """Send a text frame. Raises SocketGoneError, also when the peer takes nothing for too long."""
        if self.is_gone:
            raise SocketGoneError
        try:
            with self._send_lock:
                self._ws.send(frame)
        except (ConnectionClosed, LocalProtocolError, OSError):
            raise SocketGoneError from None

    def close(self, code: CloseCode, reason: str) -> None:
        """Send a close frame; nothing can be sent afterwards."""
        with suppress(ConnectionClosed, LocalProtocolError, OSError), self._send_lock:
            self._ws.close(code.value, reason)

    @contextmanager
    def interrupting(self, interrupt: Callable[[], None]) -> Iterator[None]:
        """Have `interrupt` called as soon as the peer floods or is gone. Any thread."""
        with self._lock:
            self._interrupt = interrupt
        self._look()
        try:
            yield
        finally:
            with self._lock:
                self._interrupt = None

    def _on_event(self) -> None:
        """Look at what the reading thread just took in. Runs in that thread."""
        if self._is_flooded:
            return
        is_too_fast = self._rate is not None and self._rate.is_flood(time.monotonic())
        if is_too_fast or is_flood(tuple(self._ws.input_buffer), self._limits):
            self.close(CloseCode.FLOOD, "too many frames at once")
            self._is_flooded = True
            self._look()
            raise FloodError
        self._look()

    def _look(self) -> None:
        self._woken.set()
        with self._lock:
            if self._interrupt is not None and self.is_gone:
                self._interrupt()
