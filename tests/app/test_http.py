"""Pages, probes, headers and the one-shot API, through Flask's own client."""

import json
import re

import pytest

from app.config import SecurityConfig, SiteConfig
from app.factory import create_app, site_of
from app.model_registry import ModelRegistry, ModelSource
from app.security import is_own_origin, normal_origin
from swarm_protocol.errors import CacheFullError
from tests.app.fake_swarm import FakeModel


@pytest.fixture
def model():
    return FakeModel(script=["Hello", " you", "</s>"])


def client_of(model, config=None, *, load=True):
    app = create_app(config or SiteConfig(), ModelRegistry([ModelSource(model.name, lambda: model)]))
    if load:
        site_of(app).models.load()
    return app.test_client()


@pytest.fixture
def client(model):
    return client_of(model)


@pytest.mark.parametrize(
    "request_arguments",
    [
        {"data": {"inputs": "Hi", "max_new_tokens": "5", "do_sample": "0", "temperature": ""}},
        {"data": {"inputs": "Hi", "max_new_tokens": "5"}, "content_type": "multipart/form-data"},
        {"json": {"inputs": "Hi", "max_new_tokens": 5, "do_sample": True, "model": "umbel/fake-1b"}},
        {"query_string": {"inputs": "Hi", "max_new_tokens": 5, "do_sample": "true"}},
        {"data": {"inputs": "Hi", "max_length": "50", "stop_sequence": "ignored"}},
    ],
)
def test_one_shot_generate_takes_every_encoding(client, model, request_arguments):
    response = client.post("/api/v1/generate", **request_arguments)
    assert response.status_code == 200
    assert response.json == {"ok": True, "outputs": "Hello you"}
    assert model.counts.open_sessions == 0
    assert response.headers["Access-Control-Allow-Origin"] == "*"
    assert "Access-Control-Allow-Credentials" not in response.headers


@pytest.mark.parametrize(
    ("fields", "code", "status"),
    [
        ({"max_new_tokens": 5}, "invalid_request", 400),
        ({"inputs": "Hi"}, "invalid_request", 400),
        ({"inputs": "Hi", "max_new_tokens": 5, "top_p": 7}, "invalid_request", 400),
        ({"inputs": "Hi", "max_new_tokens": 5, "model": "other"}, "model_not_found", 404),
        ({"inputs": "Hi", "max_new_tokens": 99999}, "max_length_exceeded", 400),
    ],
)
def test_one_shot_errors_are_200_unless_strict(client, model, fields, code, status):
    response = client.post("/api/v1/generate", data=fields)
    assert response.status_code == 200
    assert response.json["ok"] is False
    assert response.json["error"]["code"] == response.headers["X-Error-Code"] == code
    assert "\n" not in response.json["traceback"]
    assert client.post("/api/v1/generate?strict=1", data=fields).status_code == status
    assert model.counts.open_sessions == 0


def test_a_body_that_is_nested_too_deeply_is_refused(client):
    found = client.post("/api/v1/generate?strict=1", data=b"[" * 100_000, content_type="application/json")
    assert (found.status_code, found.json["error"]["code"]) == (400, "invalid_request")


def test_swarm_errors_and_bugs_reach_the_client_without_a_stack(client, model):
    model.error_at = (1, CacheFullError(9, 1))
    response = client.post("/api/v1/generate?strict=1", data={"inputs": "Hi", "max_new_tokens": 5})
    assert response.status_code == 503
    assert "attention cache is full" in response.json["traceback"]
    model.error_at = (0, ZeroDivisionError("secret"))
    response = client.post("/api/v1/generate", data={"inputs": "Hi", "max_new_tokens": 5})
    assert response.json["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert model.counts.open_sessions == 0


def test_models_are_listed_under_both_prefixes(client):
    for prefix in ("/v1", "/api/v1"):
        found = client.get(f"{prefix}/models", headers={"Authorization": "Bearer anything"}).json
        assert found["object"] == "list"
        assert found["data"][0]["id"] == "umbel/fake-1b"
        assert (found["data"][0]["object"], found["data"][0]["status"]) == ("model", "ready")
        assert client.get(f"{prefix}/models/umbel/fake-1b").json["context_length"] == 2048
    missing = client.get("/v1/models/other/one")
    assert (missing.status_code, missing.json["error"]["code"]) == (404, "model_not_found")


def test_probes_follow_the_models(model):
    client = client_of(model, load=False)
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 503
    assert client.get("/readyz").json["status"] == "loading"
    site_of(client.application).models.load()
    assert client.get("/readyz").status_code == 200


def test_the_page_is_strict_and_whole(client):
    response = client.get("/")
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "trusted-types 'none'" in policy
    assert "Access-Control-Allow-Origin" not in response.headers
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    config = re.search(r'id="config">(.*?)</script>', response.text, re.DOTALL)
    assert json.loads(config[1])["models"][0]["id"] == "umbel/fake-1b"
    assert not re.search(r"https?://", response.text)
    assert not re.search(r"<[^>]* (style|on\w+)=", response.text)
    files = re.findall(r'(?:href|src)="(/static/[^"]+)"', response.text)
    assert len(files) > 10
    for name in files:
        found = client.get(name, buffered=True)
        assert found.status_code == 200
        assert "immutable" in found.headers["Cache-Control"]
    assert client.get("/static/0123456789abcdef/css/chat.css").status_code == 404
    assert client.get(re.sub("css/chat.css", "../app/cli.py", files[1])).status_code == 404


def test_a_models_name_cannot_leave_the_page_config():
    client = client_of(FakeModel(name="</script><script>alert(1)"))
    assert "</script><script>alert" not in client.get("/").text


def test_unknown_paths_and_methods_are_told_in_the_form_of_their_path(client):
    assert client.get("/api/v1/generate").status_code == 405
    assert client.get("/api/nothing").json["error"]["code"] == "http_404"
    assert client.get("/nothing").text == "404 Not Found\n"
    assert client.get("/api/v2/generate").status_code == 400
    assert client.post("/api/v1/generate", data="x" * 2_000_000).json["error"]["code"] in (
        "http_413",
        "invalid_request",
    )


def test_cross_origin_answers_of_a_private_site(model):
    config = SiteConfig(security=SecurityConfig(public_api=False, allowed_origins=("https://friend.example",)))
    client = client_of(model, config)
    friend = client.get("/v1/models", headers={"Origin": "https://friend.example"})
    assert friend.headers["Access-Control-Allow-Origin"] == "https://friend.example"
    assert (
        "Access-Control-Allow-Origin"
        not in client.get("/v1/models", headers={"Origin": "https://evil.example"}).headers
    )
    for headers in ({}, {"Origin": "https://evil.example"}):
        refused = client.post("/api/v1/generate?strict=1", data={"inputs": "a"}, headers=headers)
        assert (refused.status_code, refused.json["error"]["code"]) == (403, "origin_not_allowed")
    asked = {"inputs": "a", "max_new_tokens": 1, "min_p": ""}
    assert client.post("/api/v1/generate", data=asked, headers={"Origin": "https://friend.example"}).json["ok"]
    options = client.options("/api/v1/generate", headers={"Origin": "https://friend.example"})
    assert "POST" in options.headers["Access-Control-Allow-Methods"]


@pytest.mark.parametrize(
    ("origin", "is_own"),
    [
        ("http://site.example", True),
        ("http://SITE.example:80", True),
        ("https://friend.example", True),
        ("https://site.example", False),
        ("http://site.example:8080", False),
        ("http://site.example.evil", False),
        ("http://evil/?http://site.example", False),
        ("null", False),
        ("", False),
        (None, False),
        ("http://[::1", False),
        ("http://site.example:x", False),
    ],
)
def test_origins(origin, is_own):
    assert is_own_origin(origin, "http://site.example/", ["https://friend.example"]) is is_own


def test_normal_origins():
    assert normal_origin("https://A.example:443") == "https://a.example"
    assert normal_origin("http://[::1]:5000") == "http://[::1]:5000"
    assert normal_origin("file:///etc") is None


@pytest.mark.parametrize("asked", ["1", "true"])
def test_times_come_with_an_answer_where_they_are_asked_for(client, model, asked):
    fields = {"inputs": "hi", "max_new_tokens": 2}
    assert set(client.post("/api/v1/generate", data=fields).json) == {"ok", "outputs"}
    found = client.post("/api/v1/generate", data={**fields, "times": asked}).json
    assert found["times"]["tokens"] == 2
    assert set(found) == {"ok", "outputs", "times"}
