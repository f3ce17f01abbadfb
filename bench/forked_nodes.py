"""Nodes that start fast: forked from a process that has imported everything, which takes a node most of its start.

A measurement that kills a node every two seconds needs as many new ones, and a node that is started from nothing takes
two cores for several seconds. Each is a process of its own all the same, with a network daemon of its own.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from bench.node_processes import LOOPBACK, START_TIMEOUT_S, with_dtype

_PR_SET_PDEATHSIG = 1


class ForkedNode:
    """A node with its span in `blocks`; `address` is its multiaddress once it is online."""

    def __init__(self, pid: int, output: Path, blocks: str) -> None:
        self.pid = pid
        self.blocks = blocks
        self._output = output

        self._address = ""

    @property
    def address(self) -> str:
        """Its multiaddress; empty before it serves."""
        if not self._address:
            lines = self._output.read_text().splitlines(keepends=True)
            line = next((line for line in lines if "/p2p/" in line and line.endswith("\n")), "")
            self._address = line.split()[-1] if line else ""
        return self._address

    @property
    def peer_id(self) -> str:
        """Its peer id; empty before it serves."""
        return self.address.rsplit("/", 1)[-1]

    def wait_until_online(self) -> "ForkedNode":
        """Return when the node serves."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self.address:
            assert time.monotonic() < deadline_s, "the node is not online in time"
            time.sleep(0.05)
        return self

    def kill(self) -> None:
        """End the node as a power cut would. Idempotent."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


class NodeNursery:
    """Forks nodes of one model; a context manager that kills those that are left."""

    def __init__(self, folder: Path) -> None:
        """`folder` is for what the nodes print."""
        self._folder = folder
        self._nodes: list[ForkedNode] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.forked_nodes"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"},
        )  # fmt: skip

    def bootstrap(self) -> ForkedNode:
        """Return a first peer that serves nothing."""
        return self._fork("", ["bootstrap", "--log-level", "error", *LOOPBACK]).wait_until_online()

    def start(self, model: str, blocks: str, peer: str, *options: str) -> ForkedNode:
        """Return a node that is not online yet."""
        common = ("--blocks", blocks, "--threads", "1", "--log-level", "error", "--initial-peers", peer)
        return self._fork(blocks, ["run", model, *common, *LOOPBACK, *with_dtype(options)])

    def _fork(self, blocks: str, arguments: Sequence[str]) -> ForkedNode:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        output = self._folder / f"node-{len(self._nodes)}.txt"
        output.touch()
        self._process.stdin.write(json.dumps([str(output), *arguments]) + "\n")
        self._process.stdin.flush()
        self._nodes.append(node := ForkedNode(int(self._process.stdout.readline()), output, blocks))
        return node

    def __enter__(self) -> "NodeNursery":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for pid in self._living():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _living(self) -> Iterator[int]:
        """The pids that are still the nursery's children: a number may have been given to somebody else since."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        yield from (node.pid for node in self._nodes if str(node.pid) in children)


def _end_with_parent() -> None:
    """Let this process be killed when the one that forked it ends, however that ends (Linux only)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Fork a node for every line of arguments, and say its process id."""
    # All that a node loads until it is online, of torch, transformers and hivemind. No tensor is made before the fork:
    # the threads of torch would be missing in the child.
    from transformers.models.bloom import modeling_bloom  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    from server_node import cli, node, run_file  # noqa: F401
    from swarm_protocol.transport import hivemind_net  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that the dead are not left as zombies
    for line in sys.stdin:
        output, *arguments = json.loads(line)
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        _end_with_parent()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os._exit(cli.main(arguments))


if __name__ == "__main__":
    main()
