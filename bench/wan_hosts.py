"""Hosts of their own on one machine: network namespaces with delay and bandwidth between any two. Needs root and a C
compiler."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from swarm_protocol.errors import ConfigError

_SOURCE = Path(__file__).with_name("wan_emulator.c")
_MTU = 1500


class WanHosts:
    """`count` hosts; any two are as far from each other as `set_links` said last. A context manager."""

    def __init__(self, count: int) -> None:
        """Raises ConfigError where namespaces cannot be made."""
        if os.geteuid() != 0 or not Path("/dev/net/tun").exists():
            raise ConfigError("network namespaces and TUN devices are needed: run it as root")
        for program in ("cc", "ip"):
            if shutil.which(program) is None:
                raise ConfigError(f"{program} is not installed; on Debian: apt-get install gcc iproute2")
        self.addresses = [f"10.98.0.{number + 1}" for number in range(count)]
        self._names = [f"umbel-wan-{os.getpid()}-{number}" for number in range(count)]
        self._folder = tempfile.TemporaryDirectory()
        self._emulator: subprocess.Popen[str] | None = None

    def prefix(self, number: int) -> tuple[str, ...]:
        """Return what runs a command line on a host."""
        return ("ip", "netns", "exec", self._names[number])

    def set_links(self, delay_s: float, mbit_per_s: float) -> None:
        """From now on packets take `delay_s` one way and leave a host at so many Mbit/s; 0 for any."""
        assert self._emulator is not None
        assert self._emulator.stdin is not None
        self._emulator.stdin.write(f"{delay_s * 1e6:.0f} {mbit_per_s:g}\n")
        self._emulator.stdin.flush()
        self._wait_for("set")

    def __enter__(self) -> "WanHosts":
        program = str(Path(self._folder.name) / "wan_emulator")
        subprocess.run(["cc", "-O2", "-o", program, str(_SOURCE)], check=True)
        try:
            for name in self._names:
                _ip("netns", "add", name)
            pairs = [word for pair in zip(self._names, self.addresses, strict=True) for word in pair]
            self._emulator = subprocess.Popen(
                [program, *pairs], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            self._wait_for("ready")
            for name, address in zip(self._names, self.addresses, strict=True):
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", "wan0")
                _ip("-n", name, "link", "set", "wan0", "mtu", str(_MTU), "up")
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def _wait_for(self, word: str) -> None:
        assert self._emulator is not None
        assert self._emulator.stdout is not None
        found = self._emulator.stdout.readline().strip()
        if found != word:
            raise ConfigError(f"the emulator said {found!r} where {word!r} was expected")

    def _close(self) -> None:
        if self._emulator is not None:
            self._emulator.kill()
            self._emulator.communicate()
        for name in self._names:
            _ip("netns", "delete", name, is_needed=False)
        self._folder.cleanup()


def _ip(*words: str, is_needed: bool = True) -> None:
    arguments: Sequence[str] = ("ip", *words)
    subprocess.run(arguments, check=is_needed, stderr=None if is_needed else subprocess.DEVNULL)
