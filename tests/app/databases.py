"""Databases for tests: SQLite in a file, and a PostgreSQL server of our own on a socket in a folder of its own.

The server is started once for each process that asks. Where it cannot be had, tests are skipped, in CI they fail.
"""

import ctypes
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
USERS = ("postgres", "nobody")
"""Who runs it when we are root, which PostgreSQL refuses."""

PR_SET_PDEATHSIG = 1
START_S = 120.0
FAST = "-c fsync=off -c full_page_writes=off -c listen_addresses="


def missing(why: str) -> None:
    """Skip the test that needs PostgreSQL; in CI it fails."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"PostgreSQL is needed in CI: {why}")
    pytest.skip(f"!!! NOT TESTED ON POSTGRESQL: {why}; on Debian: apt-get install postgresql !!!")


def _die_with_parent() -> None:
    """Runs in the server's process, before it is one and after it changed its user, which would undo this."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGQUIT)


class PostgresServer:
    """A running server."""

    def __init__(self, folder: Path, binaries: Path, user: str | None) -> None:
        self.folder, self._binaries, self._user = folder, binaries, user
        self._process: subprocess.Popen[bytes] | None = None

    def new_url(self) -> str:
        """Return the URL of no database."""
        return f"postgresql://umbel@/nothing?host={self.folder}"

    @property
    def _place(self) -> dict[str, Any]:
        """Return where and as whom its programs run."""
        become = (
            {"user": self._user, "group": pwd.getpwnam(self._user).pw_gid, "extra_groups": []} if self._user else {}
        )
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
        return {"cwd": self.folder, "env": environment, "stdin": subprocess.DEVNULL, **become}

    def make(self) -> None:
        """Make its data. Raises AssertionError with what went wrong."""
        done = subprocess.run(
            [self._binaries / "initdb", "--no-sync", "--no-instructions", "-A", "trust", "-U", "umbel", "-E", "UTF8",
             "--locale=C", "-D", f"{self.folder}/data"],
            capture_output=True, text=True, timeout=START_S, check=False, **self._place,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def start(self) -> None:
        """Start it, and wait until it answers. It ends with this process, however that ends."""
        with (self.folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                [self._binaries / "postgres", "-D", f"{self.folder}/data", *FAST.split(),
                 "-c", f"unix_socket_directories={self.folder}"],
                stdout=log, stderr=log, preexec_fn=_die_with_parent, **self._place,
            )  # fmt: skip
        deadline_s = time.monotonic() + START_S
        while True:
            try:
                psycopg.connect(host=str(self.folder), user="umbel", dbname="postgres").close()
            except psycopg.OperationalError:
                said = (self.folder / "log").read_text()
                assert self._process.poll() is None, said
                assert time.monotonic() < deadline_s, said
                time.sleep(0.05)
            else:
                return

    def stop(self) -> None:
        """Stop it at once; connections break."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(START_S)
            self._process = None

    def new_database(self) -> str:
        """Make an empty database; return its URL."""
        name = f"site_{secrets.token_hex(6)}"
        with psycopg.connect(host=str(self.folder), user="umbel", dbname="postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")  # type: ignore[call-overload]  # the name is ours
        return f"postgresql://umbel@/{name}?host={self.folder}"


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """Start a server, and end it; skips where it cannot be had."""
    if not BINARIES:
        missing("it is not installed")
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = next((user for user in USERS if user in names), None) if os.geteuid() == 0 else None
    # Not below pytest's folder, which is for this user alone, and whose long name no socket may have.
    folder = Path(tempfile.mkdtemp(prefix="umbel-pg-", dir="/tmp"))
    if user is not None:
        shutil.chown(folder, user)
    folder.chmod(0o755)
    server = PostgresServer(folder, BINARIES[-1], user)
    try:
        server.make()
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
