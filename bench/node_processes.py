"""Nodes as a volunteer starts them: processes of `umbel-node run`, on loopback."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType

START_TIMEOUT_S = 120.0
LOOPBACK = ("--host", "127.0.0.1", "--no-relay", "--no-port-mapping")


def with_dtype(options: Sequence[str]) -> tuple[str, ...]:
    """Return the options of a node, which computes in float32 unless they say otherwise: the same on every machine."""
    is_chosen = "--dtype" in options or "--quantization" in options
    return (*options,) if is_chosen else ("--dtype", "float32", *options)


class NodeProcess:
    """One node; `address` is its multiaddress once it is online."""

    def __init__(
        self, model: str, blocks: str, initial_peers: Sequence[str] = (), *options: str, prefix: Sequence[str] = ()
    ) -> None:
        """`prefix` is the command line that runs the node's, as in a namespace. Options outweigh the usual ones."""
        peers = ("--initial-peers", *initial_peers) if initial_peers else ()
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "server_node.cli", "run", model, "--blocks", blocks, "--threads", "1",
             "--log-level", "warning", *LOOPBACK, *peers, *with_dtype(options)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self.online = ""
        self.address = ""

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def wait_until_online(self) -> "NodeProcess":
        """Return when the node serves. Raises AssertionError if it ends before."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self.online:
            assert self._process.poll() is None, "the node ended before it was online"
            assert time.monotonic() < deadline_s, "the node is not online in time"
            try:
                line = self._lines.get(timeout=0.2)
            except queue.Empty:
                continue
            if line.startswith("online: "):
                self.online, self.address = line.strip(), line.split()[-1]
        return self

    def stop(self) -> int:
        """Ask the node to leave; return its exit status."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(60)

    def kill(self) -> None:
        """End the node as a power cut would."""
        self._process.kill()
        self._process.wait(10)

    def __enter__(self) -> "NodeProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self.kill()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout:
            for line in self._process.stdout:
                self._lines.put(line)
