"""`umbel-node` and its commands: the only place of a node that reads arguments and the environment.

What is asked to be shown goes to stdout, logs and progress to stderr. Exit status: 0 after a signal, 2 if the node
cannot start as it was asked to, 1 if it broke down later.
"""

import argparse
import asyncio
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from server_node.config import ComputeChoice, ModelChoice, NodeConfig, NodeLimits
from server_node.live_line import Screen, keep_shown, start_logging
from server_node.owner_commands import complain, drain, show_status
from server_node.progress import show_progress
from server_node.settings import Settings
from server_node.status_socket import status_socket
from swarm_protocol.errors import ConfigError, SwarmError
from swarm_protocol.spans import Span
from swarm_protocol.transport.network_config import NetworkConfig

if TYPE_CHECKING:
    from server_node.node import Online

logger = logging.getLogger(__name__)

MAX_NAME_CHARS = 40
_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_MOST_SECONDS = 86_400.0
_EXIT_WAIT_S = 1.0


class _Parser(argparse.ArgumentParser):
    """argparse that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv`, by default the process's arguments, and return its exit status."""
    try:
        arguments = _settings().parse(argv, os.environ)
    except ConfigError as error:
        complain(str(error))
        return 2
    screen = start_logging(arguments.log_level.upper())
    # Its lines show links to a hub's storage, which open it for whoever has them.
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    # Before torch is loaded, which reads it then: threads that wait for work must sleep, not spin. Two spinning ones
    # per node on two shared cores cost 40 to 60 % of the throughput when several nodes run on one machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    lifecycle = _Lifecycle()
    start: Callable[[], Awaitable[None]]
    if arguments.command == "drain":
        return drain(arguments.identity)
    if arguments.command == "status":
        return show_status(arguments.identity, is_json=arguments.json)
    if arguments.command == "run":
        config = _node_config(arguments)
        start = lambda: _run(config, lifecycle, screen, arguments.metrics_port)  # noqa: E731
    else:
        network = _network_config(arguments)
        start = lambda: _bootstrap(network, lifecycle)  # noqa: E731
    status = _status_of(lifecycle, start)
    _leave_device_thread(status)
    return status


class _Lifecycle:
    """Whether the command is up, and whether it was asked to stop."""

    def __init__(self) -> None:
        self.is_up = False
        self.stop = asyncio.Event()
        self.on_stop: Callable[[], None] = lambda: None

    async def watch(self, start: Callable[[], Awaitable[None]]) -> None:
        """Run `start`. The first signal sets `stop`, or cancels what is not up yet; the second ends the process."""
        task = asyncio.ensure_future(start())

        def on_signal() -> None:
            if self.stop.is_set():
                os._exit(1)
            logger.info("asked to stop; once more, and it is at once")
            self.stop.set()
            self.on_stop()
            if not self.is_up:
                task.cancel()

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, on_signal)
        try:
            await task
        except asyncio.CancelledError:
            if not self.stop.is_set():
                raise

    def up(self, *lines: str) -> None:
        """The command does what it was started for: show `lines`."""
        self.is_up = True
        for line in lines:
            print(line, flush=True)  # noqa: T201 - what the commands are documented to show


def _status_of(lifecycle: _Lifecycle, start: Callable[[], Awaitable[None]]) -> int:
    try:
        asyncio.run(lifecycle.watch(start))
    except Exception as error:
        problem = _root_cause(error)
        if lifecycle.is_up or not isinstance(problem, SwarmError | OSError):
            logger.error("the node broke down", exc_info=error)
            complain(f"{type(problem).__name__}: {problem}")
            return 1
        logger.debug("the node could not start", exc_info=error)
        complain(str(problem) or type(problem).__name__)
        return 2
    return 0


def _root_cause(error: BaseException) -> BaseException:
    """Return the first error in the groups that task groups make."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _leave_device_thread(status: int) -> None:
    """End the process even if the device thread is in the middle of something that was given up."""
    for thread in threading.enumerate():
        if thread.name.startswith("device"):
            thread.join(_EXIT_WAIT_S)
            if thread.is_alive():
                logging.shutdown()
                sys.stdout.flush()
                os._exit(status)


async def _run(config: NodeConfig, lifecycle: _Lifecycle, screen: Screen, metrics_port: int) -> None:
    # Not at the top: it loads torch, which takes seconds and must not happen before the environment is set.
    from server_node.life import run_node
    from server_node.metrics import metrics_page
    from server_node.node import Observer
    from server_node.run_file import run_file
    from server_node.status_board import StatusBoard

    source = config.model.source
    board, loading = StatusBoard(source), show_progress(f"loading {source}", "block")

    def on_loading(num_done: int, num_all: int) -> None:
        board.loading(num_done, num_all)
        loading(num_done, num_all)

    def on_online(online: "Online") -> None:
        board.online()
        lines = [f"online: {online.model} blocks {online.span} {online.address}"]
        if not config.network.initial_peers and not lifecycle.is_up:
            lines.append(f"others join with: umbel-node run {config.model.source} --initial-peers {online.address}")
        screen.show("")
        lifecycle.up(*lines)

    with run_file(config.network.identity_path) as running:

        def on_draining(num_sessions: int) -> None:
            if lifecycle.stop.is_set():  # else it only takes other blocks, or pauses
                running.leaving(num_sessions)

        lifecycle.on_stop = running.leaving
        download = show_progress(f"downloading {source}", "B")
        observer = Observer(on_loading, on_online, on_draining, board.loaded, download, board.unloaded, board.waiting)
        async with status_socket(running.socket_path, board.status), metrics_page(metrics_port, board.status):
            showing = asyncio.create_task(keep_shown(screen, board.status), name="live line")
            try:
                await run_node(config, lifecycle.stop, observer)
            finally:
                showing.cancel()


async def _bootstrap(network: NetworkConfig, lifecycle: _Lifecycle) -> None:
    from server_node.node import best_address, joined
    from server_node.probing import Prober
    from server_node.waiting import stopped_or_lost
    from swarm_protocol.messages import PROBE_PROTOCOL

    async with joined(network) as (transport, _):
        await transport.serve(PROBE_PROTOCOL, Prober(transport).serve)
        address = best_address(transport.addresses)
        for other in transport.addresses:
            logger.info("reachable at %s", other)
        lifecycle.up(address)
        await stopped_or_lost(lifecycle.stop, transport)


def _node_config(arguments: argparse.Namespace) -> NodeConfig:
    return NodeConfig(
        model=ModelChoice(
            source=arguments.model,
            revision=arguments.revision,
            cache_dir=arguments.cache_dir,
            max_disk_bytes=arguments.max_disk,
            blocks=arguments.blocks,
            num_blocks=arguments.num_blocks,
        ),
        compute=ComputeChoice(
            device=arguments.device,
            dtype=arguments.dtype,
            quantization=arguments.quantization,
            threads=arguments.threads,
            cache_tokens=arguments.cache_tokens,
            prefix_tokens=arguments.prefix_tokens,
        ),
        network=_network_config(arguments),
        limits=NodeLimits(
            max_sessions=arguments.max_sessions,
            max_sessions_per_peer=arguments.peer_sessions,
            max_cache_share_per_peer=arguments.peer_cache_share,
            drain_s=arguments.drain_timeout,
        ),
        name=arguments.name,
        only_when_idle=arguments.only_when_idle,
    )


def _network_config(arguments: argparse.Namespace) -> NetworkConfig:
    return NetworkConfig(
        initial_peers=tuple(arguments.initial_peers),
        host=arguments.host,
        port=arguments.port,
        announce=tuple(arguments.announce),
        identity_path=arguments.identity,
        relay=arguments.relay,
        map_ports=arguments.port_mapping,
    )


def _settings() -> Settings:
    parser = _Parser(prog="umbel-node", description="Serve blocks of a language model to a swarm.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    run = commands.add_parser("run", help="serve blocks of a model")
    run.add_argument(
        "model", metavar="MODEL", nargs="?", help="a folder of safetensors, a .gguf file, or a hub repository"
    )
    span = run.add_mutually_exclusive_group()
    span.add_argument("--blocks", type=_span, metavar="0:15", help="serve exactly these blocks, the end excluded")
    span.add_argument(
        "--num-blocks", type=_positive, metavar="N", help="serve N blocks where fewest are held; default: all that fit"
    )  # fmt: skip
    run.add_argument("--revision", help="the hub repository's branch, tag or commit")
    run.add_argument("--cache-dir", metavar="FOLDER", help="where hub repositories are kept")
    run.add_argument(
        "--max-disk", type=_size, metavar="SIZE",
        help="keep at most so much of downloaded parts of models, such as 50GB; default: no bound",
    )  # fmt: skip
    _add_compute_arguments(run)
    _add_limit_arguments(run)
    bootstrap = commands.add_parser("bootstrap", help="be a first peer that others join at")
    for command in (run, bootstrap):
        command.add_argument("--config", metavar="FILE", help="a TOML file with any of these flags; see the docs")
        _add_network_arguments(command)
    drain = commands.add_parser("drain", help="let a node that runs on this machine leave, and wait until it has")
    status = commands.add_parser("status", help="show what a node that runs on this machine does now")
    for command in (drain, status):
        command.add_argument("--identity", metavar="FILE", help="that of the node; default: the only node without one")
    status.add_argument("--json", action="store_true", help="for programs: one line of JSON")
    for command in (run, bootstrap, drain, status):
        command.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    return Settings(parser, commands.choices)


def _add_compute_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …; default: cpu")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="auto, the default, is float32 on a CPU and the checkpoint's own elsewhere",
    )  # fmt: skip
    parser.add_argument(
        "--quantization", default="none", choices=("none", "int8", "nf4"),
        help="hold the large weights in 8 or 4 bits; on a CPU nf4 is 4-bit integers in groups of 32; default: none",
    )  # fmt: skip
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads; 1 where nodes share a machine")
    parser.add_argument(
        "--cache-tokens", type=_positive, metavar="N", help="KV cache in tokens; default: half of the free memory"
    )
    parser.add_argument(
        "--prefix-tokens", type=_count, metavar="N",
        help="tokens of prompts to keep for later sessions; default: an eighth of the cache, 0 keeps none",
    )  # fmt: skip


def _add_limit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-sessions", type=_positive, default=NodeLimits().max_sessions, metavar="N",
        help="sessions that may be open at once; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--peer-sessions", type=_positive, default=NodeLimits().max_sessions_per_peer, metavar="N",
        help="how many of them one peer may have; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--metrics-port", type=_port, default=0, metavar="N",
        help="port of this machine alone at which Prometheus finds metrics; default: 0, none",
    )  # fmt: skip
    parser.add_argument(
        "--peer-cache-share", type=_share, default=NodeLimits().max_cache_share_per_peer, metavar="X",
        help="how much of the cache one peer may take; default: %(default)s, 1 in a swarm of one's own",
    )  # fmt: skip
    parser.add_argument(
        "--drain-timeout", type=_seconds, default=NodeLimits().drain_s, metavar="S",
        help="seconds that open sessions have to move to other nodes when this one leaves; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--only-when-idle", action="store_true", help="pause, by draining, while the owner's programs use the device"
    )
    parser.add_argument("--name", default="", type=_name, help=f"shown to people, at most {MAX_NAME_CHARS} characters")


def _add_network_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--initial-peers", nargs="+", action="extend", default=[], metavar="MADDR",
        help="peers of the swarm to join; without any, a new swarm is started",
    )  # fmt: skip
    parser.add_argument("--host", default="0.0.0.0", metavar="ADDR", help="address to listen on; default: all")  # noqa: S104
    parser.add_argument("--port", type=_port, default=0, metavar="N", help="port to listen on; default: any free one")
    parser.add_argument(
        "--announce", nargs="+", action="extend", default=[], metavar="MADDR", help="addresses to tell others"
    )
    parser.add_argument("--identity", metavar="FILE", help="the peer's key, made if missing; default: a new one")
    parser.add_argument("--no-relay", dest="relay", action="store_false", help="neither use nor be a relay")
    parser.add_argument(
        "--no-port-mapping", dest="port_mapping", action="store_false", help="do not ask the router to forward the port"
    )


def _span(text: str) -> Span:
    try:
        return Span.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"a whole number above 0 is needed, not {text!r}")
    return int(text)


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0.0 < share <= 1.0:
        raise argparse.ArgumentTypeError(f"a share above 0 and up to 1 is needed, not {text!r}")
    return share


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])B?", text.upper())
    size_bytes = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if not size_bytes:
        raise argparse.ArgumentTypeError(f"a size above 0 is needed, such as 50GB or 800MB, not {text!r}")
    return size_bytes


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0.0 <= seconds <= _MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"0 to {_MOST_SECONDS:g} seconds are possible, not {text!r}")
    return seconds


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"a port is 0 to 65535, not {text!r}")
    return int(text)


def _name(text: str) -> str:
    if len(text) > MAX_NAME_CHARS or not text.isprintable():
        raise argparse.ArgumentTypeError(f"at most {MAX_NAME_CHARS} printable characters, not {len(text)}")
    return text


if __name__ == "__main__":
    sys.exit(main())
