"""The libp2p daemon as a child process: start it, tell in our own terms why it did not start, and end it.

The daemon ends by itself when this process dies, even by SIGKILL: it gives up when the last persistent connection to
its control socket is gone. It runs in a session of its own, so that Ctrl-C reaches this process alone, which can then
leave the swarm in good order.
"""

import asyncio
import errno
import ipaddress
import itertools
import logging
import os
import signal
import socket
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from swarm_protocol.errors import ConfigError, InternalError, PeerUnreachableError
from swarm_protocol.transport.network_config import NetworkConfig

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_S: Final = 0.5  # between attempts to bind a port that is in use, and to reach initial peers
PORT_GRACE_S: Final = 4.0  # the daemon of a process that was killed holds its port for up to 2 s (measured 1.3 s)
STOP_GRACE_S: Final = 3.0  # from SIGTERM to SIGKILL; the daemon takes some 0.05 s when it is well
IDLE_TIMEOUT_S: Final = 30  # the daemon ends if no persistent connection was made by then


@dataclass(frozen=True, slots=True)
class DaemonFiles:
    """Where the daemon's program, key and control socket are."""

    program: Path
    identity: Path
    control_socket: Path

    def remove_socket(self) -> None:
        """Remove the control socket if there is one; the daemon would not start."""
        self.control_socket.unlink(missing_ok=True)


class Daemon:
    """A running daemon. Belongs to the event loop that started it."""

    def __init__(self, child: asyncio.subprocess.Process, output: asyncio.Task[None]) -> None:
        self._child = child
        self._output = output

    async def wait(self) -> int:
        """Wait until the process ends, and return its exit status."""
        return await self._child.wait()

    async def stop(self) -> None:
        """End the process, if it has not ended: SIGTERM, and SIGKILL if it lingers."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._child.returncode is None:
                with suppress(ProcessLookupError):
                    # Not by the child's own method: it may reap the process before asyncio does, which then complains.
                    os.kill(self._child.pid, number)
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_GRACE_S):
                    await self._child.wait()
                    break
        await asyncio.gather(self._output, return_exceptions=True)


async def start_daemon(config: NetworkConfig, initial_peers: Sequence[str], files: DaemonFiles) -> Daemon:
    """Start the daemon and wait until it listens and is connected to one of `initial_peers`, if there are any.

    The caller sets the deadline. Until it, initial peers that do not answer are tried again: they may be starting too.
    Raises ConfigError if the address cannot be listened on, InternalError if the daemon does not start.
    """
    arguments = [str(files.program), *_flags(config, initial_peers, files)]
    if not (config.client_mode and not config.relay):
        await _check_port(config.host, config.port)
    for attempt in itertools.count():
        files.remove_socket()  # of an attempt that failed
        daemon, lines = await _start_once(arguments)
        if daemon is not None:
            return daemon
        problem = _problem(config, initial_peers, lines)
        if not isinstance(problem, PeerUnreachableError):
            raise problem
        # A line every 5 s or so: peers that start together find each other within a few attempts.
        logger.log(logging.INFO if attempt % 10 == 9 else logging.DEBUG, "%s; trying again", problem)
        await asyncio.sleep(RETRY_S)
    raise AssertionError("unreachable")


def listen_address(host: str, port: int) -> str:
    """Return the multiaddress to listen on. Raises ConfigError if `host` is no IP address or `port` no port."""
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        raise ConfigError(f"cannot listen on {host!r}: an IPv4 or IPv6 address is needed, such as 0.0.0.0") from None
    if not 0 <= port < 65536:
        raise ConfigError(f"cannot listen on port {port}: 0 (any) to 65535 are allowed")
    return f"/ip{version}/{host}/tcp/{port}"


def frame_message(message: bytes) -> bytes:
    """Return `message` with its length as a varint before it, as the control socket wants it."""
    head, size = bytearray(), len(message)
    while size >= 0x80:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return bytes(head) + message


async def complete(exchange: Coroutine[Any, Any, T]) -> T:
    """Await a short exchange with the daemon to its end even when cancelled: hivemind's would leave a socket open."""
    task = asyncio.create_task(exchange)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task], timeout=STOP_GRACE_S)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise


def _flags(config: NetworkConfig, initial_peers: Sequence[str], files: DaemonFiles) -> list[str]:
    flags = {
        "listen": f"/unix{files.control_socket}",
        "id": files.identity,
        "idleTimeout": f"{IDLE_TIMEOUT_S}s",
        "connManager": 1,
        "dhtClient" if config.client_mode else "dhtServer": 1,
        "natPortMap": int(config.map_ports),
        "relay": int(config.relay or config.relay_for_others),
        "autoRelay": int(config.relay),
        "relayService": int(config.relay_for_others),
        "autonat": int(config.relay),
    }
    if config.client_mode and not config.relay:
        flags["noListenAddrs"] = 1
    else:
        flags["hostAddrs"] = listen_address(config.host, config.port)
    if config.announce:
        flags["announceAddrs"] = ",".join(config.announce)
    if initial_peers:
        flags |= {"b": 1, "bootstrapPeers": ",".join(initial_peers)}
    return [f"-{name}={value}" for name, value in flags.items()]


async def _check_port(host: str, port: int) -> None:
    """Raise ConfigError if another process listens there.

    libp2p sets SO_REUSEPORT, so a second daemon of the same user would bind the same port without a word, and the
    kernel would deal the connections out to both.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    deadline_s = asyncio.get_running_loop().time() + PORT_GRACE_S
    while True:
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                # As libp2p does: connections of a predecessor that are only waiting to time out are no obstacle.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
                return
        except OSError as error:
            is_final = error.errno != errno.EADDRINUSE or asyncio.get_running_loop().time() > deadline_s
            if is_final:
                raise ConfigError(
                    f"cannot listen on {host} port {port}: {error.strerror}; choose another with --port or --host"
                ) from error
        await asyncio.sleep(RETRY_S)


async def _start_once(arguments: Sequence[str]) -> tuple[Daemon | None, list[str]]:
    """Start the program and wait until it is ready; return None and what it wrote if it ended instead."""
    try:
        child = await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=os.environ | {"GOLOG_LOG_LEVEL": "error", "GOLOG_LOG_FMT": "nocolor"},
            start_new_session=True,
        )
    except OSError as error:
        raise InternalError(f"cannot run the network daemon {arguments[0]}: {error.strerror}") from error
    lines: list[str] = []
    ready = asyncio.Event()
    output = asyncio.create_task(_read_output(child, lines, ready), name="p2pd output")
    output.add_done_callback(lambda _: ready.set())
    daemon = Daemon(child, output)
    try:
        await ready.wait()
        if not output.done():
            return daemon, lines
        await child.wait()
    except asyncio.CancelledError:
        await daemon.stop()
        raise
    return None, lines


async def _read_output(child: asyncio.subprocess.Process, lines: list[str], ready: asyncio.Event) -> None:
    """Keep the pipe empty; set `ready` when the daemon says its peer id or ends. `lines` gets what it said before."""
    assert child.stdout is not None
    async for raw in child.stdout:
        line = raw.decode(errors="replace").rstrip()
        logger.debug("p2pd: %s", line)
        if line.startswith("Peer ID:"):
            ready.set()
        elif not ready.is_set():
            lines.append(line[:500])
            del lines[:-20]


def _problem(config: NetworkConfig, initial_peers: Sequence[str], lines: Sequence[str]) -> Exception:
    text = lines[-1] if lines else "no output"
    if "failed to listen" in text:
        reason = text.rsplit("bind: ")[-1].rstrip("]")
        return ConfigError(f"cannot listen on {config.host} port {config.port}: {reason}")
    if "bootstrap" in text:
        return PeerUnreachableError(f"none of the initial peers can be reached: {', '.join(initial_peers)}")
    return InternalError(f"the network daemon did not start: {text}")
