"""The end of a site under real gunicorn: what runs by HTTP ends in time, and is told why when it does not."""

import json
import threading

import httpx

from tests.app.site_process import running_site
from tests.app.test_health import free_port, metrics, wait_for

PATIENCE_S = 20.0


def streamed(url: str, text: str, has_begun: threading.Event, found: list[str]) -> None:
    """Read a streamed answer to its end."""
    body = {"model": "umbel/fake-1b", "messages": [{"role": "user", "content": text}], "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=PATIENCE_S) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                found.append(line.removeprefix("data: "))
                has_begun.set()


def test_sigterm_lets_streams_end_and_tells_those_that_do_not() -> None:
    found: dict[str, list[str]] = {"hi": [], "stuck": []}
    port = free_port()
    health = f"http://127.0.0.1:{port}"
    settings = {"sockets": {"drain_s": 3.0}, "operation": {"health_port": port}}
    with running_site("--delay", "0.005", settings=settings) as site:
        begun = {text: threading.Event() for text in found}
        readers = [threading.Thread(target=streamed, args=(site.url, text, begun[text], found[text])) for text in found]
        for reader in readers:
            reader.start()
        assert all(event.wait(PATIENCE_S) for event in begun.values())
        site.process.terminate()
        probe = f"{health}/health/ready"
        ready = wait_for(lambda: httpx.get(probe, timeout=PATIENCE_S), lambda answer: answer.status_code == 503)
        assert ready.json()["status"] == "draining"
        assert httpx.get(f"{health}/health/live", timeout=PATIENCE_S).status_code == 200
        assert metrics(health)["umbel_site_draining",] == 1
        for reader in readers:
            reader.join(PATIENCE_S)
        assert site.process.wait(PATIENCE_S) == 0
    assert found["hi"][-1] == "[DONE]"
    error = json.loads(found["stuck"][-1])["error"]
    assert (error["code"], error["retryable"]) == ("draining", True)
    assert not any("Traceback" in line or "ERROR" in line for line in site.log), "".join(site.log)
