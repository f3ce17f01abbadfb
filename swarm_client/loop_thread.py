"""The client's event loop, in a thread of its own, and the one place where sync callers enter it."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from swarm_client.config import ClientConfig
from swarm_protocol.errors import SessionClosedError
from swarm_protocol.transport.base import Transport

T = TypeVar("T")


class LoopThread:
    """An event loop that runs in a daemon thread until `close`."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._is_closing = False
        self._thread = threading.Thread(target=self._loop.run_forever, name="umbel-client-loop", daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> "concurrent.futures.Future[T]":
        """Start `coroutine` on the loop. Cancelling the future cancels it. Any thread but the loop's own."""
        with self._lock:  # what came in before the close is cancelled by it; nothing may come in behind it
            if not self._is_closing and self._thread.is_alive():
                return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        coroutine.close()
        raise SessionClosedError("the connection to the swarm is closed")

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` on the loop and return what it returns; an interrupt of the caller cancels it.

        Raises SessionClosedError if the loop is closed meanwhile.
        """
        future = self.submit(coroutine)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise SessionClosedError("the connection to the swarm was closed") from None
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what runs and end the thread. Idempotent."""
        with self._lock:
            was_closing, self._is_closing = self._is_closing, True
        if was_closing:
            return
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def join_network(config: ClientConfig) -> Transport:
    """Return a client's transport, joined to the swarm. Raises PeerUnreachableError or ConfigError."""
    # Imported here, since it loads libp2p's bindings, which those who are handed a transport do not need.
    from swarm_protocol.transport.hivemind_net import NetworkConfig, open_transport

    return await open_transport(
        NetworkConfig(
            initial_peers=config.initial_peers,
            identity_path=config.identity_path,
            host=config.host,
            relay=config.relay,
            map_ports=False,
            client_mode=True,
            startup_timeout_s=config.startup_s,
        )
    )
