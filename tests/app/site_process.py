"""Starts `fake_site` as a child process and tells where it listens; the process group dies with the fixture."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
START_S = 30.0


@dataclass
class SiteProcess:
    """A running site under real gunicorn."""

    process: "subprocess.Popen[str]"
    url: str
    log: list[str] = field(default_factory=list)

    @property
    def socket_url(self) -> str:
        return self.url.replace("http://", "ws://") + "/api/v2/generate"

    def counts(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.url}/test/counts", timeout=5).json()
        return found

    def wait_for(self, is_true: Callable[[dict[str, Any]], bool], timeout_s: float = 5.0) -> dict[str, Any]:
        """Return the counts as soon as they are as wanted; fail with them after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while not is_true(counts := self.counts()):
            assert time.monotonic() < deadline_s, counts
            time.sleep(0.05)
        return counts


@contextmanager
def running_site(*arguments: str, settings: dict[str, Any] | None = None) -> Iterator[SiteProcess]:
    """Run a site; ends with SIGTERM and asserts that nothing but log lines was left behind."""
    command = [sys.executable, "-m", "tests.app.fake_site", "--settings", json.dumps(settings or {}), *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(iter(process.stderr.readline, "")), daemon=True)  # type: ignore[union-attr]
    reader.start()
    try:
        line = process.stdout.readline()
        assert line.startswith("ready: http://127.0.0.1:"), (line, log)
        yield SiteProcess(process, line.removeprefix("ready: ").strip(), log)
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)
        reader.join(5)
        process.stdout.close()
        process.stderr.close()
