"""Probes and the operator's metrics on a port of their own, while nothing else of the site answers any more."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TypeVar

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.site_metrics import GAUGES, SiteMetrics
from swarm_protocol.errors import error_from_wire
from tests.app.site_process import SiteProcess, running_site
from tests.app.socket_client import Client

NUM_SOCKETS, NUM_THREADS = 3, 16  # the latter beside those of sockets, as `fake_site` has it
PATIENCE_S = 20.0

T = TypeVar("T")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def watched() -> Iterator[tuple[SiteProcess, str]]:
    """A site with few places, and where its health port is."""
    port = free_port()
    settings = {"sockets": {"ws_max": NUM_SOCKETS, "drain_s": 1.0}, "operation": {"health_port": port}}
    with running_site("--delay", "0.005", settings=settings) as site:
        yield site, f"http://127.0.0.1:{port}"


def wait_for(look: Callable[[], T], is_there: Callable[[T], bool]) -> T:
    """Return what `look` finds as soon as it is as wanted."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_there(found := look()):
        assert time.monotonic() < deadline_s, found
        time.sleep(0.05)
    return found


def metrics(health: str) -> dict[tuple[str, ...], float]:
    """Return all values, by name and labels in the order of their names."""
    text = httpx.get(f"{health}/metrics", timeout=PATIENCE_S).text
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_tell_of_requests_answers_and_errors(watched: tuple[SiteProcess, str]) -> None:
    site, health = watched
    body = {"model": "umbel/fake-1b", "messages": [{"role": "user", "content": "hi"}]}
    assert httpx.post(f"{site.url}/v1/chat/completions", json=body, timeout=PATIENCE_S).status_code == 200
    assert httpx.post(f"{site.url}/v1/chat/completions", json={**body, "model": "no"}, timeout=9).status_code == 404
    assert httpx.get(f"{site.url}/hidden/secret-name", timeout=9).status_code == 404
    with Client(site) as client:
        client.open()
        client.generate("hi", max_new_tokens=3)
        client.receive_until("done", PATIENCE_S)
    found = metrics(health)
    path = "/v1/chat/completions"
    assert found["umbel_http_requests_total", "POST", path, "200"] == 1
    assert found["umbel_http_requests_total", "POST", path, "404"] == 1
    assert found["umbel_http_requests_total", "GET", "unmatched", "404"] == 1
    assert found["umbel_http_request_seconds_count", path] == 2
    assert found["umbel_answers_total", "openai_chat", "umbel/fake-1b", "stop"] == 1
    assert found["umbel_answers_total", "chat", "umbel/fake-1b", "length"] == 1
    assert found["umbel_answer_tokens_total", "chat", "umbel/fake-1b"] == 3
    assert found["umbel_prompt_tokens_total", "chat", "umbel/fake-1b"] > 0
    assert found["umbel_first_token_seconds_count", "umbel/fake-1b"] == 2
    assert found["umbel_answer_tokens_per_second_count", "umbel/fake-1b"] == 2
    assert found["umbel_guessed_tokens_total", "umbel/fake-1b", "right"] == 6
    assert found["umbel_guessed_tokens_total", "umbel/fake-1b", "wrong"] == 2
    assert found["umbel_errors_total", "model_not_found"] == 1
    assert found["umbel_site_ready",] == 1
    assert found["process_open_fds",] > 0
    assert not any("secret-name" in part for key in found for part in key)


def test_codes_that_nodes_make_up_are_no_series_of_their_own() -> None:
    metrics = SiteMetrics(lambda: dict.fromkeys(GAUGES, 0.0))
    for number in range(9):
        error = error_from_wire(f"made_up_{'x' * number}", "nobody knows that", True)
        metrics.error(error.code)
        metrics.answer("chat", "m", error.code, 1, 1)
    metrics.answer("chat", "m", "cache_full", 1, 1)
    metrics.error("content_refused")
    text = metrics.text().decode()
    assert "made_up" not in text
    assert 'umbel_errors_total{code="other"} 9.0' in text
    assert 'umbel_errors_total{code="content_refused"} 1.0' in text
    assert 'umbel_answers_total{api="chat",model="m",outcome="cache_full"} 1.0' in text


def test_the_operators_metrics_are_not_public(watched: tuple[SiteProcess, str]) -> None:
    site, _ = watched
    text = httpx.get(f"{site.url}/metrics", timeout=PATIENCE_S).text
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert names
    assert all(name.startswith("umbel_swarm_") for name in names)


def test_the_health_port_answers_when_every_socket_and_thread_is_taken(watched: tuple[SiteProcess, str]) -> None:
    site, health = watched
    url = httpx.URL(site.url)
    with ExitStack() as held:
        for _ in range(NUM_SOCKETS):
            held.enter_context(Client(site)).open()
        body = b'{"inputs": "stuck", "max_new_tokens": 5}'
        head = "POST /api/v1/generate HTTP/1.1\r\nHost: site\r\nContent-Type: application/json\r\n"
        for _ in range(NUM_THREADS):
            connection = held.enter_context(socket.create_connection((url.host, url.port), timeout=PATIENCE_S))
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        found = wait_for(lambda: metrics(health), lambda found: found["umbel_http_generations",] == NUM_THREADS)
        assert found["umbel_sockets_open",] == found["umbel_sockets_max",] == NUM_SOCKETS
        assert found["umbel_http_generations",] == found["umbel_answers_running",] == NUM_THREADS
        with pytest.raises(httpx.ReadTimeout):
            httpx.get(f"{site.url}/health/live", timeout=1)
        assert httpx.get(f"{health}/health/live", timeout=PATIENCE_S).json()["status"] == "ok"
        assert httpx.get(f"{health}/health/ready", timeout=PATIENCE_S).json()["status"] == "ready"
        assert httpx.head(f"{health}/health/ready", timeout=PATIENCE_S).text == ""
        assert httpx.get(f"{health}/nothing", timeout=PATIENCE_S).status_code == 404
