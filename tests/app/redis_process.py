"""A Redis of the tests' own, on a socket in a folder of its own."""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

START_S = 30.0


class RedisProcess:
    """Redis while it runs; `url` is where. It keeps nothing on a disk."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="umbel-redis-")
        # Redis runs as another user where the tests run as root.
        os.chmod(self._folder.name, 0o777)
        self._socket = Path(self._folder.name) / "redis.sock"
        self.url = f"redis+unix://{self._socket}?db=0"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, empty, and wait until it answers."""
        command = ["redis-server", "--port", "0", "--unixsocket", str(self._socket), "--save", "", "--dir", "/tmp"]
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            **({"user": "nobody", "extra_groups": []} if os.geteuid() == 0 else {}),
        )
        deadline_s = time.monotonic() + START_S
        while not self._socket.exists():
            assert self._process.poll() is None, "redis-server ended before it served"
            assert time.monotonic() < deadline_s, "redis-server does not serve in time"
            time.sleep(0.02)

    def kill(self) -> None:
        """End it as a crash would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)
        self._socket.unlink(missing_ok=True)

    def close(self) -> None:
        """End it and forget its folder."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        self._folder.cleanup()


def redis_or_skip() -> RedisProcess:
    """Return a running Redis; without one the test is skipped, and in CI it fails."""
    if shutil.which("redis-server") is None:
        problem = (
            "!!! NOT TESTED WITH REDIS: redis-server is not installed; on Debian: apt-get install redis-server !!!"
        )
        if os.environ.get("CI"):
            pytest.fail(problem)
        pytest.skip(problem)
    return RedisProcess()
