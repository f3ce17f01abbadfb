"""Probes and the operator's metrics on a port of their own, from a thread of their own: they answer when every socket
and every thread of the site is taken.

`/health/live`, `/health/ready` and `/metrics`. It listens on this machine alone, unless told otherwise.
"""

import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST

from app.site import Site
from swarm_protocol.errors import ConfigError

logger = logging.getLogger(__name__)

READ_S = 5.0  # for a request to come; one that asks is next door
MAX_AT_ONCE = 8  # further ones wait: a probe, Prometheus and a person are three


def live_reply(site: Site) -> tuple[int, dict[str, object]]:
    """Return status and body of the probe that asks whether to start the process anew."""
    return 200, {"status": "ok", "websockets": site.sockets.taken}


def ready_reply(site: Site) -> tuple[int, dict[str, object]]:
    """Return status and body of the probe that asks whether to send visitors here."""
    status = "draining" if site.drain.is_started else "ready" if site.models.is_ready else "loading"
    models = {entry.name: entry.status for entry in site.models.entries()}
    return 200 if site.is_ready else 503, {"status": status, "models": models}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], site: Site) -> None:
        self.site = site
        self.places = threading.BoundedSemaphore(MAX_AT_ONCE)
        super().__init__(address, _Handler)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.places.acquire()
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread to be had
            self.places.release()
            self.shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of readers that left."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = READ_S
    server_version, sys_version = "umbel", ""

    def do_GET(self) -> None:
        site = self.server.site
        match self.path.partition("?")[0]:
            case "/health/live":
                self._send_json(*live_reply(site))
            case "/health/ready":
                self._send_json(*ready_reply(site))
            case "/metrics":
                self._send(200, CONTENT_TYPE_LATEST, site.metrics.text())
            case _:
                self._send_json(404, {"paths": ["/health/live", "/health/ready", "/metrics"]})

    do_HEAD = do_GET  # noqa: N815  the library's name

    def _send_json(self, status: int, values: dict[str, object]) -> None:
        self._send(status, "application/json", json.dumps(values).encode())

    def _send(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the library's name
        """Log nothing: a probe comes every few seconds."""


def start_health(site: Site) -> int | None:
    """Listen from now on until the process ends; return the port, None where none is configured.

    Called in the process that serves. Raises ConfigError when the port cannot be had.
    """
    config = site.config.operation
    if not config.health_port:
        return None
    try:
        server = _Server((config.health_host, config.health_port), site)
    except OSError as error:
        raise ConfigError(f"health_port {config.health_port} of {config.health_host} cannot be had: {error}") from None
    threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
    logger.info("probes and metrics are on http://%s:%d", *server.server_address[:2])
    return int(server.server_address[1])
