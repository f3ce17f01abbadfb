"""`umbel-node` and its commands: the only place of a node that reads arguments and the environment.

What is asked to be shown goes to stdout, logs and progress to stderr. Exit status: 0 after a signal, 2 if the node
cannot start as it was asked to, 1 if it broke down later.
"""

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from server_node.config import NodeConfig
from server_node.flags import benchmark_config, network_config, node_config, settings
from server_node.live_line import Screen, keep_shown, start_logging
from server_node.owner_commands import complain, drain, show_status
from server_node.progress import show_progress
from server_node.status_socket import status_socket
from swarm_protocol.errors import ConfigError, SwarmError
from swarm_protocol.transport.network_config import NetworkConfig

if TYPE_CHECKING:
    from server_node.node import Online

logger = logging.getLogger(__name__)

_EXIT_WAIT_S = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv`, by default the process's arguments, and return its exit status."""
    try:
        arguments = settings().parse(argv, os.environ)
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
        config = node_config(arguments)
        start = lambda: _run(config, lifecycle, screen, arguments.metrics_port)  # noqa: E731
    elif arguments.command == "benchmark":
        measured = benchmark_config(arguments)
        start = lambda: _benchmark(measured, lifecycle, arguments.refresh)  # noqa: E731
    else:
        network = network_config(arguments)
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


async def _benchmark(config: NodeConfig, lifecycle: _Lifecycle, is_fresh: bool) -> None:
    from server_node.benchmark_command import benchmark

    lifecycle.up(await benchmark(config, is_fresh=is_fresh))


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


if __name__ == "__main__":
    sys.exit(main())
