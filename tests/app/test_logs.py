"""The log of a site under real gunicorn: ids, fields, and nothing of what readers write."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from app import request_ids
from tests.app.site_process import SiteProcess, running_site
from tests.app.socket_client import Client

MARK = "zebra4711"  # one word, and a token of the fake model
CHAT = "/v1/chat/completions"


def visit(site: SiteProcess) -> None:
    """Send the mark, and have it said, through every API, and provoke errors that would quote it."""
    for word in ("mirror", "bug", "quote", "lost"):
        text = f"{word} {MARK} and more {MARK}"
        chat = {"model": "umbel/fake-1b", "messages": [{"role": "user", "content": text}]}
        headers = {"X-Request-ID": f"mine-{word}"}
        for path, body in (
            (CHAT, chat),
            (CHAT, {**chat, "stream": True}),
            (CHAT, {**chat, "model": MARK}),
            (CHAT, {**chat, "messages": [{"role": MARK, "content": text}]}),
            ("/v1/completions", {"model": "umbel/fake-1b", "prompt": text}),
            ("/v1/embeddings", {"model": "umbel/fake-1b", "input": text}),
            ("/api/v1/generate", {"inputs": text, "max_new_tokens": 9}),
            ("/api/v1/generate", {"inputs": text, "max_new_tokens": MARK}),
        ):
            httpx.post(f"{site.url}{path}", json=body, headers=headers, timeout=20)
        httpx.get(f"{site.url}/v1/models/{MARK}?q={MARK}", headers=headers, timeout=20)
        with Client(site) as client:
            client.open()
            client.generate(text, max_new_tokens=9)
            while client.receive()["type"] not in ("done", "error"):
                pass
        with Client(site) as client:
            client.open_legacy(max_length=64)
            client.send(type="generate", inputs=text, max_new_tokens=3)
            client.receive()
    with Client(site) as client:
        client.ws.send(f"no JSON but {MARK}")
        client.receive()


def lines(site: SiteProcess) -> list[dict[str, Any]]:
    return [json.loads(line) for line in site.log]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept") / "site.db"


@pytest.fixture(scope="module")
def discreet(database: Path) -> SiteProcess:
    """A site that was visited and has ended, so that its log is complete."""
    settings = {
        "operation": {"log_format": "json"},
        "database_url": f"sqlite:///{database}",
        "widget_keys": [{"name": "k", "origins": ["http://127.0.0.1:9"]}],
    }
    with running_site("--delay", "0.001", settings=settings) as site:
        visit(site)
    return site


def test_what_readers_write_and_get_is_in_no_line(discreet: SiteProcess) -> None:
    assert len(discreet.log) > 40
    assert not [line for line in discreet.log if MARK in line]
    assert not [line for line in discreet.log if "127.0.0.1" in line and "isten" not in line]


def test_what_readers_write_and_get_is_not_in_the_database(discreet: SiteProcess, database: Path) -> None:
    kept = b"".join(path.read_bytes() for path in database.parent.iterdir())
    assert b"widget_keys" in kept
    assert MARK.encode() not in kept


def test_every_line_is_an_object_with_its_request(discreet: SiteProcess) -> None:
    found = lines(discreet)
    assert all({"time", "level", "logger", "message"} <= set(line) for line in found)
    of_one = [line for line in found if line.get("request_id") == "mine-mirror"]
    requests = [(line["method"], line["path"], line["status"]) for line in of_one if line["message"] == "request"]
    assert requests.count(("POST", CHAT, 200)) == 2
    assert ("POST", CHAT, 404) in requests
    assert ("GET", "/v1/models/<path:model_id>", 404) in requests
    assert all(line["duration_s"] >= 0 for line in of_one if line["message"] == "request")


def test_every_answer_has_a_line_with_its_tokens(discreet: SiteProcess) -> None:
    answers = [line for line in lines(discreet) if line["message"] == "answer"]
    by_api = {line["api"]: line for line in answers if line["outcome"] == "stop"}
    assert set(by_api) >= {"chat", "openai_chat", "openai_completion"}
    told = by_api["chat"]
    assert told["model"] == "umbel/fake-1b"
    assert (told["prompt_tokens"] > 4, told["new_tokens"] > 3) == (True, True)
    assert re.fullmatch(r"[0-9a-f]{16}-1", told["request_id"])
    assert {"internal_error", "stream_lost", "length"} <= {line["outcome"] for line in answers}
    assert {line["api"] for line in answers} >= {"legacy_socket", "legacy_http"}


def test_a_bug_is_logged_with_its_stack_but_without_its_text(discreet: SiteProcess) -> None:
    bugs = [line for line in lines(discreet) if "ValueError" in line.get("exc_info", "")]
    assert len(bugs) >= 5
    assert all("fake_swarm.py" in line["exc_info"] and line["level"] == "ERROR" for line in bugs)
    assert all(line["request_id"] for line in bugs)


def test_an_operator_who_wants_prompts_gets_them_and_a_warning() -> None:
    settings = {"operation": {"log_prompts": True, "log_addresses": True}}
    with running_site("--delay", "0.001", settings=settings) as site, Client(site) as client:
        client.open()
        client.generate(f"mirror {MARK}")
        client.receive_until("done")
    assert "UMBEL_LOG_PROMPTS is on" in site.log[0]
    assert "WARNING" in site.log[0]
    (answer,) = [line for line in site.log if " answer " in line]
    assert answer.count(MARK) == 2  # the prompt's and the answer's
    assert any("address=127.0.0.1" in line for line in site.log if " request " in line)


@pytest.mark.parametrize(
    "asked", [None, "", "abc", "x" * 65, "-abcd", "a b c d", "abcd\n", "abcd\r\nX: y", "äöüß", "a/b/c"]
)
def test_an_id_that_is_ill_formed_is_replaced(asked: str | None) -> None:
    assert re.fullmatch("[0-9a-f]{16}", request_ids.chosen_id(asked))


@pytest.mark.parametrize("asked", ["abcd", "0f-1", "5f2c.9e:0b_7a", "x" * 64])
def test_a_well_formed_id_is_kept(asked: str) -> None:
    assert request_ids.chosen_id(asked) == asked


def test_the_id_is_sent_back_by_every_path(discreet: SiteProcess) -> None:
    from tests.app.test_every_route import make_app

    client = make_app().test_client()
    for path in ("/", "/healthz", "/v1/models", "/nothing", "/api/v1/generate"):
        assert client.get(path, headers={"X-Request-ID": "mine-1"}).headers["X-Request-ID"] == "mine-1"
        assert len(client.get(path, headers={"X-Request-ID": "mine 1"}).headers["X-Request-ID"]) == 16
