"""What holds for every route of the site, whatever is added later: no answer shows the inside of the program."""

import re

import pytest
from flask import Flask

from app.config import SiteConfig
from app.factory import create_app, site_of
from app.model_registry import ModelRegistry, ModelSource
from app.security import HEADERS
from tests.app.fake_swarm import FakeModel

SECRET = "postgres://umbel:hunter2@db"
INSIDE = re.compile(r"Traceback|File \"|\.py\b|hunter2|ZeroDivisionError|site-packages")
WEBSOCKET = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def make_app() -> Flask:
    model = FakeModel(script=["Hello", "</s>"])
    app = create_app(SiteConfig(), ModelRegistry([ModelSource(model.name, lambda: model)]))
    site_of(app).models.load()
    return app


def requests_of(app: Flask) -> list[tuple[str, str, str]]:
    """Return endpoint, method and a path for every route."""
    found = []
    for rule in app.url_map.iter_rules():
        path = re.sub(r"<[^>]+>", "some-name", rule.rule)
        found += [(rule.endpoint, method, path) for method in sorted(rule.methods or ())]
    return found


ALL = requests_of(make_app())


def check(response) -> None:
    assert not INSIDE.search(response.text), response.text[:300]
    for name, value in HEADERS.items():
        assert response.headers[name] == value
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in response.headers["Content-Security-Policy"]
    assert "Set-Cookie" not in response.headers  # nothing that another site's request could ride on
    assert "Server" not in response.headers or "ython" not in response.headers["Server"]


def test_routes_are_found():
    assert len(ALL) > 15
    assert any("generate" in path for _, _, path in ALL)


@pytest.mark.parametrize("origin", ["http://localhost", "https://evil.example"])
@pytest.mark.parametrize(("endpoint", "method", "path"), ALL, ids=[f"{method} {path}" for _, method, path in ALL])
def test_a_bug_behind_a_route_is_told_without_the_inside(endpoint, method, path, origin):
    app = make_app()

    def broken(**_):
        raise ZeroDivisionError(SECRET)

    app.view_functions[endpoint] = broken
    is_socket = any(rule.websocket for rule in app.url_map.iter_rules(endpoint))
    headers = {"Origin": origin, **(WEBSOCKET if is_socket else {})}
    response = app.test_client().open(path, method=method, headers=headers)
    assert response.status_code == (200 if method == "OPTIONS" else 500)
    check(response)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"inputs": 1e999}', b"\xff" * 100, b"[" * 5000])
@pytest.mark.parametrize(("endpoint", "method", "path"), ALL, ids=[f"{method} {path}" for _, method, path in ALL])
def test_nonsense_is_no_bug_of_any_route(endpoint, method, path, body):
    client = make_app().test_client()
    response = client.open(path, method=method, data=body, content_type="application/json")
    assert response.status_code < 500
    check(response)
