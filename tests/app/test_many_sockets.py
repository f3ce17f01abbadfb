"""Many connections of every kind, also of clients that stop or lie: all are dropped in time, nothing is left."""

import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import httpx
import pytest
from websockets.exceptions import ConnectionClosed

from tests.app.site_process import SiteProcess, running_site
from tests.app.socket_client import Client

EACH = 10
LIMITS = {"sockets": {"ws_max": EACH, "ping_interval_s": 2.0, "stall_s": 1.0, "send_timeout_s": 1.0}}
BACK = ("websockets", "open_sessions", "reading_threads", "nr_conns", "descriptors", "threads")
PATIENCE_S = 20.0  # for a machine that is busy with other things


@pytest.fixture(scope="module")
def strict_site() -> Iterator[SiteProcess]:
    with running_site("--delay", "0.005", settings=LIMITS) as process:
        for visit in (talks_and_closes, talks_the_older_protocol):  # what is made at a first use is no leak
            visit(process)
        process.wait_for(lambda counts: counts["reading_threads"] == 0, PATIENCE_S)
        yield process


def raw(site: SiteProcess, text: str) -> socket.socket:
    """Return a connection on which `text` was sent."""
    url = httpx.URL(site.url)
    connection = socket.create_connection((url.host, url.port), timeout=PATIENCE_S)
    connection.sendall(text.encode())
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    """Return all that comes until the site closes; fails after PATIENCE_S without anything."""
    found = b""
    with connection, suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            found += piece
    return found


def talks_and_closes(site: SiteProcess) -> None:
    with Client(site) as client:
        client.open()
        client.generate("hi", max_new_tokens=3)
        client.receive_until("done", PATIENCE_S)


def talks_the_older_protocol(site: SiteProcess) -> None:
    with Client(site) as client:
        client.open_legacy(max_length=64)
        client.send(type="generate", inputs="hi", max_new_tokens=3)
        assert client.receive(PATIENCE_S)["stop"]


def leaves_in_the_middle(site: SiteProcess) -> None:
    with Client(site) as client:
        client.open()
        client.generate("stuck")
        client.receive_until("delta", PATIENCE_S)


def vanishes_in_the_middle(site: SiteProcess) -> None:
    with Client(site) as client:
        client.open()
        client.generate("stuck")
        client.receive_until("delta", PATIENCE_S)
        client.ws.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.ws.socket.close()


def floods(site: SiteProcess) -> None:
    with Client(site) as client:
        client.open()
        client.generate("stuck")
        client.receive_until("delta", PATIENCE_S)
        with suppress(ConnectionClosed):
            for _ in range(200):
                client.send(type="ping")
        assert client.close_code(PATIENCE_S) == 1008


def sends_too_much(site: SiteProcess) -> None:
    with Client(site) as client:
        client.ws.send("x" * 1_000_000)
        assert client.close_code(PATIENCE_S) == 1009


def answers_no_ping(site: SiteProcess) -> None:
    handshake = raw(
        site,
        "GET /api/v2/generate HTTP/1.1\r\nHost: site\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    )
    answer = read_to_end(handshake)
    assert answer.startswith(b"HTTP/1.1 101")
    assert b"\x88" in answer  # a close frame, behind pings


def reads_nothing(site: SiteProcess) -> None:
    client = Client(site, max_queue=1)
    client.open()
    client.generate("wide")
    site.wait_for(lambda counts: counts["open_sessions"] == 0, PATIENCE_S)
    client.ws.close_timeout = 0.1
    client.close()


def stops_in_the_headers(site: SiteProcess) -> None:
    assert read_to_end(raw(site, "GET / HTTP/1.1\r\nHost: si")) == b""


POST = "POST /api/v1/generate HTTP/1.1\r\nHost: site\r\nContent-Type: application/json\r\n"


def stops_in_the_body(site: SiteProcess) -> None:
    assert b'"ok":true' not in read_to_end(raw(site, POST + 'Content-Length: 100\r\n\r\n{"inputs": "h'))


def stops_in_a_chunk(site: SiteProcess) -> None:
    assert b'"ok":true' not in read_to_end(raw(site, POST + "Transfer-Encoding: chunked\r\n\r\n64\r\n{"))


@pytest.mark.parametrize(
    "visit",
    [
        talks_and_closes, talks_the_older_protocol, leaves_in_the_middle, vanishes_in_the_middle, floods,
        sends_too_much, answers_no_ping, stops_in_the_headers, stops_in_the_body, stops_in_a_chunk,
    ],
)  # fmt: skip
def test_nothing_is_left_of_many(strict_site: SiteProcess, visit: Callable[[SiteProcess], None]) -> None:
    before = strict_site.counts()
    with ThreadPoolExecutor(EACH) as pool:
        list(pool.map(visit, [strict_site] * EACH))
    strict_site.wait_for(lambda counts: all(counts[name] <= before[name] for name in BACK), PATIENCE_S)


def test_a_reader_of_nothing_leaves_nothing(strict_site: SiteProcess) -> None:
    before = strict_site.counts()
    reads_nothing(strict_site)
    strict_site.wait_for(lambda counts: all(counts[name] <= before[name] for name in BACK), PATIENCE_S)
    assert not any("Traceback" in line for line in strict_site.log), "".join(strict_site.log)


def test_half_requests_do_not_stop_the_site(strict_site: SiteProcess) -> None:
    with ExitStack() as connections:
        for _ in range(3 * EACH + 16):  # more than the site has threads
            connections.enter_context(raw(strict_site, "GET / HTTP/1.1\r\nHost: si"))
        assert httpx.get(f"{strict_site.url}/healthz", timeout=PATIENCE_S).status_code == 200
