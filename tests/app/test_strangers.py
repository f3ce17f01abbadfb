"""What strangers can put in front of readers, send to the site, or make other people's browsers send to it."""

from contextlib import suppress

import httpx
import pytest
from flask import Flask
from websockets.exceptions import ConnectionClosed

from app.config import SecurityConfig, SiteConfig
from app.factory import create_app, site_of
from app.model_registry import ModelRegistry, ModelSource
from app.security import HEADERS
from swarm_protocol.errors import MAX_REMOTE_CHARS, error_from_wire
from tests.app.fake_swarm import FakeModel
from tests.app.socket_client import Client

CLOSED = (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError)  # by the site, while we were still sending
HOSTILE = "</script><img src=x onerror=alert(1)>\x1b[2J\r\nSet-Cookie: a=b\u202e\x00 " * 500


def make_app(model: FakeModel | None = None, config: SiteConfig | None = None) -> Flask:
    model = model or FakeModel(script=["Hello", "</s>"])
    app = create_app(config or SiteConfig(), ModelRegistry([ModelSource(model.name, lambda: model)]))
    site_of(app).models.load()
    return app


@pytest.mark.parametrize("code", ["cache_full", "a_new_code", "x\r\nSet-Cookie: a=b", "<b>", "y" * 1000])
def test_what_a_node_says_is_one_short_line_of_text(code):
    model = FakeModel(script=["Hello"], error_at=(0, error_from_wire(code, HOSTILE, retryable=True)))
    response = (
        make_app(model).test_client().post("/api/v1/generate?strict=1", json={"inputs": "hi", "max_new_tokens": 3})
    )
    assert response.status_code >= 500
    assert response.mimetype == "application/json"
    assert response.headers["X-Content-Type-Options"] == "nosniff"  # so that the text is never read as HTML
    assert "Set-Cookie" not in response.headers
    found = response.json["error"]
    assert len(found["message"]) <= MAX_REMOTE_CHARS
    assert found["message"].isprintable()
    assert found["code"] == response.headers["X-Error-Code"]
    assert len(found["code"]) < 100
    assert len(response.data) < 4 * MAX_REMOTE_CHARS


def test_what_nodes_lack_is_listed_as_text():
    model = FakeModel(missing=["</script><b>", "12:16"])
    client = make_app(model).test_client()
    assert client.get("/v1/models").json["data"][0]["missing_blocks"] == ["</script><b>", "12:16"]
    assert "</script><b>" not in client.get("/").text


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://localhost"}, 200),
        ({"Origin": "http://localhost"}, 200),
        ({"Origin": "https://friend.example", "Sec-Fetch-Site": "cross-site"}, 200),
        ({}, 200),  # no browser: there is nobody to be misused
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "null", "Sec-Fetch-Site": "same-origin"}, 403),
        ({"Origin": "http://localhost.evil.example", "Sec-Fetch-Site": "cross-site"}, 403),
    ],
)
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_other_pages_change_nothing_by_the_pages_own_routes(method, headers, status):
    app = make_app(config=SiteConfig(security=SecurityConfig(allowed_origins=("https://friend.example",))))
    app.add_url_rule("/setting", "setting", lambda: "changed", methods=[method])
    response = app.test_client().open("/setting", method=method, headers=headers)
    assert response.status_code == status
    assert app.test_client().get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200  # a link to it


@pytest.mark.parametrize(
    ("content_type", "body", "has_length"),
    [
        ("application/json", b'{"inputs": "' + b"x" * 2_000_000 + b'"}', True),
        ("application/json", b'{"inputs": "' + b"x" * 2_000_000 + b'"}', False),
        ("application/x-www-form-urlencoded", b"inputs=" + b"x" * 2_000_000, True),
        ("application/x-www-form-urlencoded", b"inputs=" + b"x" * 2_000_000, False),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n' * 5000 + b"--b--\r\n",
            True,
        ),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data; name=" + b"n" * 900_000, True),
    ],
    ids=["json", "chunked-json", "form", "chunked-form", "many-parts", "long-part-header"],
)
def test_bodies_are_bounded(site, content_type, body, has_length):
    sent = body if has_length else iter([body[at : at + 65536] for at in range(0, len(body), 65536)])
    try:
        response = httpx.post(
            f"{site.url}/api/v1/generate?strict=1", content=sent, headers={"Content-Type": content_type}, timeout=20
        )
    except CLOSED:
        assert httpx.get(f"{site.url}/healthz", timeout=20).status_code == 200
        return
    assert response.status_code in (400, 413)
    assert response.json()["error"]["code"] in ("invalid_request", "http_413", "request_too_large")


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/" + "x" * 50_000, {}),
        ("/", {"X-Long": "x" * 100_000}),
        ("/", {f"X-{number}": "x" for number in range(500)}),
    ],
    ids=["path", "header", "headers"],
)
def test_heads_are_bounded(site, path, headers):
    try:
        response = httpx.get(site.url + path, headers=headers, timeout=20)
    except CLOSED:
        assert httpx.get(f"{site.url}/healthz", timeout=20).status_code == 200
        return
    assert response.status_code in (400, 414, 431)
    assert "Traceback" not in response.text
    assert ".py" not in response.text


def test_a_refused_websocket_has_the_headers_of_every_answer():
    app = make_app()
    places = site_of(app).sockets
    while places.try_take():
        pass
    response = app.test_client().get("/api/v2/generate", headers={"Upgrade": "websocket", "Connection": "Upgrade"})
    assert response.status_code == 503
    for name, value in HEADERS.items():
        assert response.headers[name] == value
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost", "file://"])
def test_protocol_3_is_refused_to_pages_of_others_whatever_they_say_first(site, origin):
    for first in ({"type": "open", "protocol": 3}, {"type": "open", "protocol": 3, "model": "umbel/fake-1b"}):
        with Client(site, origin=origin) as client:
            client.send(**first)
            with suppress(ConnectionClosed):  # the site may have hung up already
                client.generate("hi")
            assert client.receive()["code"] == "origin_not_allowed"
            assert client.close_code() == 4403
