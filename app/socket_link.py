"""A websocket as the chat sees it: frames in, frames out, and word from the reading thread while a step blocks."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from simple_websocket import ConnectionClosed
from wsproto.utilities import LocalProtocolError

from app.chat_protocol import is_cancel_of
from app.config import SocketLimits
from app.limits import CloseCode, is_flood


class SocketGoneError(Exception):
    """The peer is gone, or was sent away: nobody is left to tell anything."""


class FloodError(OSError):
    """Raised in the reading thread to end it; simple-websocket takes an OSError for the end of the connection."""


@dataclass(frozen=True, slots=True)
class _Running:
    generation_id: str | None
    interrupt: Callable[[], None]


class SocketLink:
    """Owns one simple-websocket connection. `receive`, `send` and `close` belong to the handler's thread."""

    def __init__(self, ws: Any, limits: SocketLimits) -> None:
        self._ws, self._limits = ws, limits
        self._lock = threading.Lock()
        # Held until a frame is out: a send that finds a close under way would end the connection ahead of its frame.
        self._send_lock = threading.Lock()
        self._running: _Running | None = None
        self._is_flooded = False
        ws.event.listener = self._on_event
        ws.sock.on_close = self._look

    @property
    def is_gone(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._is_flooded or not self._ws.connected or self._ws.sock.is_closed

    def receive(self, timeout_s: float) -> str | bytes | None:
        """Return the next frame, or None after `timeout_s` without one. Raises SocketGoneError."""
        if self.is_gone:
            raise SocketGoneError
        try:
            frame: str | bytes | None = self._ws.receive(timeout=timeout_s)
        except ConnectionClosed:
            raise SocketGoneError from None
        if self.is_gone:  # a peer that left wants no answers to what it had sent ahead
            raise SocketGoneError
        return frame

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
    def interrupting(self, generation_id: str | None, interrupt: Callable[[], None]) -> Iterator[None]:
        """Have `interrupt` called as soon as the peer cancels `generation_id`, floods, or is gone. Any thread."""
        with self._lock:
            self._running = _Running(generation_id, interrupt)
        self._look()
        try:
            yield
        finally:
            with self._lock:
                self._running = None

    def _on_event(self) -> None:
        """Look at what the reading thread just took in. Runs in that thread."""
        if self._is_flooded:
            return
        if is_flood(tuple(self._ws.input_buffer), self._limits):
            self.close(CloseCode.FLOOD, "too many frames at once")
            self._is_flooded = True
            self._look()
            raise FloodError
        self._look()

    def _look(self) -> None:
        with self._lock:
            running = self._running
            if running is not None and (self.is_gone or self._is_cancelled(running)):
                running.interrupt()

    def _is_cancelled(self, running: _Running) -> bool:
        wanted = running.generation_id
        return wanted is not None and any(is_cancel_of(frame, wanted) for frame in tuple(self._ws.input_buffer))
