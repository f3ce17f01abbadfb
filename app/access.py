"""What surrounds every request: its id, its line in the log, and its place in the metrics."""

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from flask import Flask, request
from werkzeug.wsgi import ClosingIterator

from app import request_ids
from app.caller import caller_of
from app.site import Site
from app.ws_socket import WsgiApp, is_websocket

logger = logging.getLogger(__name__)

ROUTE = "umbel.route"
UNMATCHED = "unmatched"
QUIET = ("/static/", "/health", "/readyz", "/metrics")
"""Routes whose requests are seldom worth a line: asked for by machines, or many for each page."""


class _Access:
    """One request, from its arrival to the last byte of its answer. Used by one thread."""

    def __init__(self, site: Site, environ: dict[str, Any]) -> None:
        self._site, self._environ = site, environ
        self._started_s = time.monotonic()
        # The websocket library answers on the connection itself; nothing of ours sees the handshake succeed.
        self._status = 101 if is_websocket(environ) else 0
        self._is_ended = False
        self.request_id = request_ids.chosen_id(environ.get("HTTP_X_REQUEST_ID"))

    def starting(self, start_response: Callable[..., Any]) -> Callable[..., Any]:
        def start(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            self._status = int(status[:3])
            return start_response(status, [*headers, (request_ids.HEADER, self.request_id)], *more)

        return start

    def end(self) -> None:
        if self._is_ended:
            return
        self._is_ended = True
        environ, elapsed_s = self._environ, time.monotonic() - self._started_s
        method, route = environ["REQUEST_METHOD"], environ.get(ROUTE, UNMATCHED)
        self._site.metrics.request(method, route, self._status, elapsed_s)
        fields = {"method": method, "path": route, "status": self._status, "duration_s": round(elapsed_s, 3)}
        key_id = caller_of(environ).key_id
        if key_id is not None:
            fields["key_id"] = key_id
        if self._site.config.operation.log_addresses:
            fields["address"] = environ.get("REMOTE_ADDR", "")
        level = logging.DEBUG if route.startswith(QUIET) else logging.INFO
        logger.log(level, "request", extra={"fields": fields})
        request_ids.leave()


def with_access(app: WsgiApp, site: Site) -> WsgiApp:
    """Return `app` with every request under an id, logged and counted."""

    def run(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        access = _Access(site, environ)
        request_ids.enter(access.request_id)
        try:
            body = app(environ, access.starting(start_response))
        except BaseException:
            access.end()
            raise
        is_file = isinstance(body, environ.get("wsgi.file_wrapper", ()))
        if is_file:  # sent by the kernel, as long as it is not wrapped
            access.end()
            return body
        closing: Iterable[bytes] = ClosingIterator(body, [access.end])
        return closing

    return run


def register(app: Flask) -> None:
    """Have the route of each request of `app` known outside of it, in place of the path that the client sent."""

    @app.before_request
    def note_route() -> None:
        request.environ[ROUTE] = UNMATCHED if request.url_rule is None else request.url_rule.rule
