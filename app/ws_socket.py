"""The socket that a websocket runs on under gunicorn: a duplicate of gunicorn's own, with a lock and a deadline.

gunicorn 27 and simple-websocket 1.1 disagree about who closes the connection's socket: the library closes gunicorn's
socket object, gunicorn then fails to use it and counts the connection down twice, so that its limit of connections and
its graceful end stop working. A duplicated descriptor leaves gunicorn's object alone. On the way the duplicate gets
what the library lacks: sends of two threads never interleave or get lost half-way, a reader that takes nothing is
dropped after `send_timeout_s`, and a close waits a moment for the peer, so that the close frame is not lost in a reset.
"""

import select
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

WsgiApp = Callable[[dict[str, Any], Any], Iterable[bytes]]

LINGER_S = 1.0  # for the peer to read the close frame and answer it; a round trip round the world is 0.3 s


class SocketEvent(threading.Event):
    """The event that simple-websocket sets for every frame and close it reads, which tells a listener as well."""

    def __init__(self) -> None:
        super().__init__()
        self.listener: Callable[[], None] | None = None

    def set(self) -> None:
        """Wake the handler's thread and tell the listener. Called by the thread that reads the socket."""
        super().set()
        if self.listener is not None:
            self.listener()


class WebSocketStream:
    """A connected socket for one reading thread and any number of sending ones."""

    def __init__(self, sock: socket.socket, send_timeout_s: float) -> None:
        self._sock = sock.dup()
        self._send_timeout_s = send_timeout_s
        self._send_lock = threading.Lock()
        self._close_lock = threading.Lock()
        self._is_used = False
        self._is_broken = False
        self._is_closed = False
        self._has_ended = threading.Event()
        self.on_close: Callable[[], None] | None = None

    @property
    def is_used(self) -> bool:
        """Whether the websocket was accepted: from then on the connection is not gunicorn's to answer on."""
        return self._is_used

    @property
    def is_closed(self) -> bool:
        """Whether this side has ended the connection."""
        return self._is_closed or self._is_broken

    def send(self, data: bytes) -> int:
        """Send all of `data`. Raises OSError when the peer is gone or takes nothing for too long."""
        with self._send_lock:
            self._is_used = True
            deadline_s = time.monotonic() + self._send_timeout_s
            rest = memoryview(data)
            while rest:
                try:
                    rest = rest[self._sock.send(rest, socket.MSG_DONTWAIT) :]
                except BlockingIOError:
                    self._wait_writable(deadline_s)
        return len(data)

    def _wait_writable(self, deadline_s: float) -> None:
        poller = select.poll()  # select.select() fails for descriptors from 1024 on
        try:
            poller.register(self._sock.fileno(), select.POLLOUT)
        except ValueError:
            raise BrokenPipeError("the connection was closed meanwhile") from None
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not poller.poll(left_s * 1000):
            self._is_broken = True
            self._shutdown(socket.SHUT_RDWR)
            raise BrokenPipeError(f"the reader took nothing for {self._send_timeout_s:g} s")

    def recv(self, size: int) -> bytes:
        """Return what has arrived; empty when the peer has closed."""
        return self._sock.recv(size)

    def fileno(self) -> int:
        """Return the descriptor, for selectors."""
        return self._sock.fileno()

    def close(self) -> None:
        """End the connection and free the descriptor. Called by the reading thread as the last thing it does."""
        self.end()
        # Another thread may be in `end`: closing now would reset the connection, and lose the close frame on its way.
        self._has_ended.wait(2 * LINGER_S)
        self._sock.close()

    def end(self) -> None:
        """End the connection, after the peer had a moment to read what was sent. Idempotent; any thread.

        The descriptor of an accepted websocket stays open for the reading thread: closed under its feet, it would
        drop out of that thread's selector without a word, and the thread would wait for the next ping.
        """
        with self._close_lock:
            if self._is_closed:
                return
            self._is_closed = True
        try:
            self._end()
        finally:
            self._has_ended.set()

    def _end(self) -> None:
        if self.on_close is not None:
            self.on_close()
        if not self._is_used:  # gunicorn answers on the connection; a shutdown would reach its descriptor too
            self._sock.close()
            return
        if not self._is_broken:
            self._shutdown(socket.SHUT_WR)
            self._wait_for_peer()
        self._shutdown(socket.SHUT_RDWR)

    def _wait_for_peer(self) -> None:
        """Read and drop until the peer closes: closing with unread bytes would reset the connection."""
        poller = select.poll()
        deadline_s = time.monotonic() + LINGER_S
        try:
            poller.register(self._sock.fileno(), select.POLLIN)
            while (left_s := deadline_s - time.monotonic()) > 0 and poller.poll(left_s * 1000):
                if not self._sock.recv(65536, socket.MSG_DONTWAIT):
                    return
        except (OSError, ValueError):  # reset, or the reading thread was faster and has closed already
            return

    def _shutdown(self, how: int) -> None:
        try:
            self._sock.shutdown(how)
        except OSError:  # the peer was faster
            return


def is_websocket(environ: dict[str, Any]) -> bool:
    """Return whether a request asks to become a websocket."""
    return str(environ.get("HTTP_UPGRADE", "")).lower() == "websocket"


def with_websockets(app: WsgiApp, send_timeout_s: float) -> WsgiApp:
    """Return `app` with every websocket of gunicorn's on a `WebSocketStream`, which ends when `app` returns."""

    def run(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if not is_websocket(environ) or "gunicorn.socket" not in environ:
            return app(environ, start_response)
        stream = WebSocketStream(environ["gunicorn.socket"], send_timeout_s)
        environ["gunicorn.socket"] = stream
        # Compression costs 100 kB a socket and lets small frames grow without limit (measured 2026-11).
        environ.pop("HTTP_SEC_WEBSOCKET_EXTENSIONS", None)
        try:
            return app(environ, start_response)
        finally:
            stream.end()

    return run
