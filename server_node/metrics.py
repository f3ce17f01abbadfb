"""The status of a node as a page for Prometheus, to be read from this machine alone."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from server_node.status import STATES, NodeStatus
from swarm_protocol.errors import ConfigError

logger = logging.getLogger(__name__)

_HOST = "127.0.0.1"
_TIMEOUT_S = 10.0
_MAX_READERS = 8
_MAX_HEAD_BYTES = 16 * 1024
_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _Facts(Collector):
    def __init__(self, status: Callable[[], NodeStatus]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        now = self._status()
        about = {"model": now.model, "blocks": now.blocks or "", "software": now.software, "peer_id": now.peer_id or ""}
        yield InfoMetricFamily("umbel_node", "What the node serves.", value=about)
        state = GaugeMetricFamily("umbel_node_state", "1 for the state that the node is in.", labels=["state"])
        for name in STATES:
            state.add_metric([name], float(name == now.state))
        yield state
        for name, what, value in (
            ("uptime_seconds", "Since the start.", now.uptime_s),
            ("sessions", "Open now.", now.num_sessions),
            ("peers", "That have a stream open here.", now.num_peers),
            ("cache_tokens", "Size of the KV cache.", now.cache_tokens),
            ("cache_used_tokens", "Reserved by sessions.", now.cache_used_tokens),
            ("memory_bytes", "Resident memory of the process.", now.memory_bytes),
            ("prompt_tokens_per_second", "Measured before the blocks were served.", now.prompt_tokens_per_s),
            ("uplink_bytes_per_second", "Measured to other peers.", now.uplink_bytes_per_s),
        ):
            if value is not None:
                yield GaugeMetricFamily(f"umbel_node_{name}", what, value=value)
        steps = GaugeMetricFamily("umbel_node_decode_steps_per_second", "Measured likewise.", labels=["rows"])
        for rows, rate in now.decode_steps_per_s.items():
            steps.add_metric([rows], rate)
        yield steps
        # A step puts out as many tokens as it takes in.
        yield CounterMetricFamily("umbel_node_tokens", "Computed for sessions.", value=now.num_tokens)
        yield CounterMetricFamily("umbel_node_steps", "Computed for sessions.", value=now.num_steps)
        yield CounterMetricFamily("umbel_node_queue_seconds", "That steps have waited.", value=now.queue_s)
        errors = CounterMetricFamily("umbel_node_errors", "Steps and openings that failed.", labels=["code"])
        for code, count in now.errors.items():
            errors.add_metric([code], count)
        yield errors


def metrics_text(status: Callable[[], NodeStatus]) -> bytes:
    """Return the page."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Facts(status))
    return generate_latest(registry)


@contextlib.asynccontextmanager
async def metrics_page(port: int, status: Callable[[], NodeStatus]) -> AsyncIterator[None]:
    """Serve `/metrics` inside, on the event loop; with port 0 nothing. Raises ConfigError if the port is taken."""
    if not port:
        yield
        return
    num_readers = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_readers
        num_readers += 1
        try:
            if num_readers <= _MAX_READERS:
                async with asyncio.timeout(_TIMEOUT_S):
                    writer.write(_response((await reader.readuntil(b"\r\n\r\n")), status))
                    await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            logger.debug("who asked for the metrics went away")
        except Exception as error:
            logger.error("bug in the metrics", exc_info=error)
        finally:
            num_readers -= 1
            writer.close()

    try:
        server = await asyncio.start_server(answer, _HOST, port, limit=_MAX_HEAD_BYTES)
    except OSError as error:
        raise ConfigError(f"cannot listen on {_HOST}:{port} for metrics: {error.strerror}") from error
    logger.info("metrics at http://%s:%d/metrics", _HOST, port)
    try:
        yield
    finally:
        server.close()


def _response(head: bytes, status: Callable[[], NodeStatus]) -> bytes:
    method, path, *_ = [*head.split(b"\r\n", 1)[0].split(b" "), b"", b""]
    if method != b"GET" or path.partition(b"?")[0] != b"/metrics":
        return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    body = metrics_text(status)
    lines = ["HTTP/1.1 200 OK", f"Content-Type: {_CONTENT_TYPE}", f"Content-Length: {len(body)}", "Connection: close"]
    return "\r\n".join([*lines, "", ""]).encode() + body
