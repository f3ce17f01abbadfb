"""The site under gunicorn: one worker of threads, started here or by `gunicorn.conf.py`."""

import logging
import os
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flask import Flask
from gunicorn.app.base import BaseApplication  # type: ignore[import-untyped]
from gunicorn.arbiter import Arbiter  # type: ignore[import-untyped]
from gunicorn.glogging import Logger  # type: ignore[import-untyped]

from app.config import SiteConfig
from app.factory import create_app, site_of
from app.health import start_health
from swarm_protocol.errors import ConfigError

logger = logging.getLogger(__name__)

KEEPALIVE_S = 95  # longer than the 90 s of Heroku's router, which must not find a closed connection
GRACEFUL_MARGIN_S = 5  # behind the drain of answers, for close frames; together below the 30 s after which hosts kill


def announce_ready(host: str, port: int) -> None:
    """Print the line that says where the site is ready, for people and for scripts that wait for it."""
    shown = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host  # noqa: S104
    shown = f"[{shown}]" if ":" in shown else shown
    sys.stdout.write(f"ready: http://{shown}:{port}\n")
    sys.stdout.flush()


class _StalledRequests(logging.Filter):
    """Shortens what gunicorn logs of a client that stopped in mid-request: strangers could fill the log with stacks."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Drop the stack of a read that took too long."""
        if record.exc_info and isinstance(record.exc_info[1], BlockingIOError):
            record.msg, record.args, record.exc_info = "dropped a client that stopped in mid-request", (), None
            record.levelno, record.levelname = logging.INFO, "INFO"
        return True


def bound_reads(listener: socket.socket, stall_s: float) -> None:
    """Have every connection that `listener` accepts fail a read that waits longer than `stall_s`.

    gunicorn's threads wait for the rest of a request without a limit, so that as many half requests as there are
    threads would stop the site. Connections inherit the option from the listener, at least on Linux and BSD.
    """
    seconds = int(stall_s)
    wait = struct.pack("ll", seconds, int((stall_s - seconds) * 1e6))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)


def gunicorn_settings(config: SiteConfig) -> dict[str, Any]:
    """Return gunicorn's settings for a site.

    One worker, whatever WEB_CONCURRENCY says: each one would join the swarm and hold the models' ends by itself.
    Nothing is preloaded: the swarm client's threads and child process must start after the fork.
    """
    threads = config.sockets.ws_max + config.http_threads

    def post_worker_init(worker: Any) -> None:
        port = worker.sockets[0].getsockname()[1]
        for listener in worker.sockets:
            bound_reads(listener.sock, config.sockets.stall_s)
        worker.log.error_log.addFilter(_StalledRequests())

        def is_alive() -> bool:
            # A worker whose master was killed ends as well, though nobody tells it to; its sockets would keep it.
            return bool(worker.alive) and os.getppid() == worker.ppid

        def give_up() -> None:
            # A site without any model is of no use: this status makes gunicorn's master end with it, too.
            logger.error("no model could be opened; the reasons are above")
            logging.shutdown()
            os._exit(Arbiter.WORKER_BOOT_ERROR)

        try:
            start_health(site_of(worker.wsgi))
        except ConfigError as error:
            logger.error("%s", error)
            sys.exit(Arbiter.WORKER_BOOT_ERROR)
        site_of(worker.wsgi).start(is_alive, on_ready=lambda: announce_ready(config.host, port), on_failed=give_up)

    def worker_exit(_server: Any, worker: Any) -> None:
        if isinstance(getattr(worker, "wsgi", None), Flask):
            site_of(worker.wsgi).close()

    return {
        "bind": [f"[{config.host}]:{config.port}" if ":" in config.host else f"{config.host}:{config.port}"],
        "workers": 1,
        "worker_class": "gthread",
        "threads": threads,
        "worker_connections": 2 * threads,
        "timeout": 120,
        "graceful_timeout": int(config.sockets.drain_s) + GRACEFUL_MARGIN_S,
        "keepalive": KEEPALIVE_S,
        "preload_app": False,
        "max_requests": 0,
        "control_socket_disable": True,
        "worker_tmp_dir": "/dev/shm" if Path("/dev/shm").is_dir() else None,  # noqa: S108
        "logger_class": _SiteLogger,
        "errorlog": "-",
        "accesslog": None,
        "post_worker_init": post_worker_init,
        "worker_exit": worker_exit,
    }


class _SiteLogger(Logger):  # type: ignore[misc]
    """gunicorn's log as part of the site's."""

    def setup(self, cfg: Any) -> None:
        """Leave writing to whoever has configured the log. Called by gunicorn."""
        super().setup(cfg)
        self.error_log.handlers.clear()
        self.error_log.propagate = True


class _GunicornSite(BaseApplication):  # type: ignore[misc]
    """gunicorn with its settings and application handed over, instead of read from a command line."""

    def __init__(self, settings: dict[str, Any], make_app: Callable[[], Flask]) -> None:
        self._settings, self._make_app = settings, make_app
        super().__init__()

    def load_config(self) -> None:
        """Take the settings. Called by gunicorn, also on reload."""
        for name, value in self._settings.items():
            self.cfg.set(name, value)

    def load(self) -> Flask:
        """Make the application. Called by gunicorn in the worker."""
        try:
            return self._make_app()
        except ConfigError as error:
            logger.error("%s", error)
            sys.exit(Arbiter.WORKER_BOOT_ERROR)


def serve(config: SiteConfig, make_app: Callable[[SiteConfig], Flask] = create_app) -> None:
    """Serve a site until SIGTERM or SIGINT; prints `ready: http://…` once its models are open. Does not return."""
    _GunicornSite(gunicorn_settings(config), lambda: make_app(config)).run()
