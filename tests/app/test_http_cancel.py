"""A client that leaves, or takes nothing, frees at once what its request held, even while a step of the swarm hangs.

A step that hangs lasts 20 s here, unless it is cancelled; what is waited for comes before that or not at all.
"""

import json
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from app.config import GenerationLimits, SiteConfig
from app.factory import create_app, site_of
from app.model_registry import ModelRegistry, ModelSource
from tests.app.fake_swarm import TalkingModel, scripted_reply
from tests.app.site_process import SiteProcess

STUCK = [{"role": "user", "content": "stuck"}]
REQUESTS = {
    "chat": ("/v1/chat/completions", {"messages": STUCK}),
    "chat streamed": ("/v1/chat/completions", {"messages": STUCK, "stream": True}),
    "completion": ("/api/v1/completions", {"prompt": ["stuck", "stuck"]}),
    "completion streamed": ("/api/v1/completions", {"prompt": "stuck", "stream": True}),
    "embedding": ("/v1/embeddings", {"input": "stuck"}),
    "one-shot": ("/api/v1/generate", {"inputs": "stuck", "max_new_tokens": 20}),
}


SOON_S = 15.0
"""Below the 20 s, however slow the machine is."""


def send(site: SiteProcess, path: str, body: object) -> socket.socket:
    """Return a connection on which a request was sent."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", urlsplit(site.url).port), timeout=10)
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("name", REQUESTS)
def test_a_client_that_leaves_ends_a_step_that_hangs(site: SiteProcess, name: str) -> None:
    cancels = site.counts()["cancels"]
    connection = send(site, *REQUESTS[name])
    site.wait_for(lambda counts: counts["generating_threads"] == 1, SOON_S)
    if "streamed" in name:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    connection.close()
    counts = site.wait_for(lambda counts: not (counts["generating_threads"] or counts["open_sessions"]), SOON_S)
    assert counts["cancels"] > cancels
    assert counts["http_generations"] == 0


def test_a_reader_that_takes_nothing_is_dropped(site: SiteProcess) -> None:
    wide = {"messages": [{"role": "user", "content": "wide"}], "stream": True}
    connection = send(site, "/v1/chat/completions", wide)
    site.wait_for(lambda counts: counts["generating_threads"] == 1, SOON_S)
    site.wait_for(lambda counts: not (counts["generating_threads"] or counts["open_sessions"]), SOON_S)
    connection.close()


def test_a_client_that_leaves_in_the_middle_of_an_answer_ends_it(site: SiteProcess) -> None:
    tokens = site.counts()["generated_tokens"]
    connection = send(site, "/v1/chat/completions", {"messages": [{"role": "user", "content": "long"}], "stream": True})
    received = b""
    while b"word3" not in received:
        received += connection.recv(65536)
    connection.close()
    counts = site.wait_for(lambda counts: not (counts["generating_threads"] or counts["open_sessions"]), SOON_S)
    assert counts["generated_tokens"] - tokens < 400


@pytest.fixture
def model() -> TalkingModel:
    return TalkingModel(reply=scripted_reply)


@pytest.fixture
def stream(model: TalkingModel) -> Iterator[object]:
    """A streamed answer that hangs behind its second token, of a site that shows signs of life all the time."""
    config = SiteConfig(generation=GenerationLimits(sse_ping_interval_s=0.01))
    app = create_app(config, ModelRegistry([ModelSource(model.name, lambda: model)]))
    site_of(app).models.load()
    response = app.test_client().post("/v1/chat/completions", json={"messages": STUCK, "stream": True})
    response.app = app  # type: ignore[attr-defined]
    yield response
    response.close()
    assert model.counts.open_sessions == 0


def test_a_stream_shows_signs_of_life_from_the_beginning(stream, model: TalkingModel) -> None:
    pieces = stream.iter_encoded()
    assert next(pieces).startswith(b": ping" + b" " * 2000)
    pings = 0
    while pings < 3:
        pings += next(pieces) == b": ping\n\n"
    stream.close()
    model.wait_until_closed()


def test_the_end_of_the_site_is_told_in_a_stream(stream, model: TalkingModel) -> None:
    pieces = stream.iter_encoded()
    while next(pieces) != b": ping\n\n":
        pass
    for cancel in tuple(site_of(stream.app).drain._cancels):
        cancel()
    rest = [piece for piece in pieces if piece.startswith(b"data: ")]
    assert json.loads(rest[-1][6:])["error"]["code"] == "draining"
    assert b"[DONE]" not in b"".join(rest)
    model.wait_until_closed()


def test_a_request_that_comes_again_takes_the_place_of_the_first(model: TalkingModel) -> None:
    app = create_app(SiteConfig(), ModelRegistry([ModelSource(model.name, lambda: model)]))
    site_of(app).models.load()

    def post(text: str, key: str, **fields: object) -> object:
        body = {"messages": [{"role": "user", "content": text}], **fields}
        return app.test_client().post("/v1/chat/completions", json=body, headers={"Idempotency-Key": key})

    first = post("stuck", "a", stream=True)
    assert post("hi", "b").status_code == 200
    assert model.counts.open_sessions == 1
    assert post("hi", "a").status_code == 200
    assert json.loads(first.text.strip().rsplit("\n\n", 1)[-1][6:])["error"]["code"] == "replaced"
    model.wait_until_closed()


def test_a_stream_that_nobody_began_to_read_is_ended_too(stream, model: TalkingModel) -> None:
    stream.close()
    model.wait_until_closed()
