"""API keys: made, listed and revoked, and asked for by the APIs."""

import time
from dataclasses import replace

import pytest
from flask.testing import FlaskClient
from sqlalchemy import select

from app import api_keys as module
from app.api_access import bearer_text
from app.api_keys import SECRET, ApiKey, ApiKeys, KeyLimits
from app.cli import main
from app.config import SecurityConfig, SiteConfig
from app.database import IN_MEMORY, Database
from app.durations import parse_duration_s
from app.factory import create_app, site_of
from app.model_registry import ModelRegistry, ModelSource
from app.site import Site
from app.tables import api_keys
from swarm_protocol.errors import ConfigError
from tests.app.fake_swarm import FakeModel

OWN = {"Origin": "http://localhost"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def site_with(**security: object) -> tuple[Site, FlaskClient]:
    model = FakeModel(script=["Hello", "</s>"])
    config = SiteConfig(database_url=IN_MEMORY, security=SecurityConfig(**security))  # type: ignore[arg-type]
    app = create_app(config, ModelRegistry([ModelSource(model.name, lambda: model)]))
    site_of(app).models.load()
    return site_of(app), app.test_client()


def with_key(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


# in the database


def test_a_key_is_found_by_its_secret_alone_and_only_its_hash_is_kept(database: Database) -> None:
    keys = ApiKeys(database)
    key, secret = keys.create("lab", KeyLimits(5, 1000, 2, 3600.0))
    assert SECRET.fullmatch(secret)
    assert secret.startswith(key.id + "_")
    assert keys.find(secret) == key == ApiKeys(database).find(secret)
    assert (key.name, key.requests_per_minute, key.tokens_per_day, key.sessions) == ("lab", 5, 1000, 2)
    assert key.expires_at == key.created_at + 3600
    assert keys.find(secret[:-1] + ("A" if secret[-1] != "A" else "B")) is None
    assert keys.find("none") is None
    with database.reading() as connection:
        assert connection is not None
        (row,) = connection.execute(select(api_keys)).all()
    assert secret.removeprefix(key.id) not in str(row)


def test_another_process_learns_of_a_revoked_key(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.fresh.FRESH_S", 0.3)
    other = Database(database_url)
    keys, others = ApiKeys(database), ApiKeys(other)
    key, secret = keys.create("lab", KeyLimits())
    found = others.find(secret)
    assert found is not None
    assert found.is_usable(time.time())
    assert keys.revoke(key.id)
    assert not keys.revoke(key.id)
    deadline_s = time.monotonic() + 60
    while (found := others.find(secret)) is not None and found.is_usable(time.time()):
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    assert [each.revoked_at is not None for each in others.list()] == [True]
    other.close()


def test_an_expired_key_is_not_usable() -> None:
    key = ApiKey("uk_1", "n", None, None, None, 0.0, 10.0, None)
    assert key.is_usable(9.9)
    assert not key.is_usable(10.0)
    assert replace(key, expires_at=None).is_usable(1e12)
    assert not replace(key, revoked_at=5.0).is_usable(6.0)


@pytest.mark.parametrize("limits", [KeyLimits(0), KeyLimits(None, -1), KeyLimits(sessions=0)])
def test_limits_that_allow_nothing_are_refused(limits: KeyLimits) -> None:
    with pytest.raises(ConfigError):
        ApiKeys(Database(IN_MEMORY)).create("n", limits)
    with pytest.raises(ConfigError):
        ApiKeys(Database(IN_MEMORY)).create("", KeyLimits())


def test_lengths_of_time_are_read() -> None:
    assert [parse_duration_s(text) for text in ("30m", " 12h", "90d")] == [1800, 43_200, 7_776_000]
    for text in ("", "d", "0d", "-1d", "5", "5 w", "1e3d", "٣d"):
        with pytest.raises(ConfigError):
            parse_duration_s(text)


def test_the_command_shows_a_secret_once(
    database_url: str, database: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UMBEL_DATABASE_URL", database_url)
    assert main(["keys", "create", "--name", "lab", "--tokens-per-day", "9", "--sessions", "2"]) == 0
    secret = capsys.readouterr().out.strip()
    key = ApiKeys(database).find(secret)
    assert key is not None
    assert main(["keys", "create", "--name", "brief", "--expires-in", "1d"]) == 0
    capsys.readouterr()
    assert main(["keys", "list"]) == 0
    shown = capsys.readouterr().out
    assert secret not in shown
    assert "lab  (9 tokens a day, 2 at once)" in shown
    assert "until" in shown
    assert main(["keys", "revoke", secret]) == 0  # the whole secret names its key, too
    assert main(["keys", "revoke", secret]) == 2
    assert secret.removeprefix(key.id) not in capsys.readouterr().err
    assert main(["keys", "list"]) == 0
    assert "revoked" in capsys.readouterr().out
    assert main(["keys", "create", "--name", "x", "--expires-in", "soon"]) == 2


# at the APIs


@pytest.mark.parametrize(
    ("header", "text"),
    [("Bearer a", "a"), ("bearer  a ", "a"), ("Basic a", ""), ("", ""), ("Bearer", ""), ("a", "")],
)
def test_only_bearer_texts_are_read(header: str, text: str) -> None:
    assert bearer_text(header) == text


def test_a_public_site_takes_any_text_and_refuses_only_keys_of_its_form_that_are_none() -> None:
    site, client = site_with()
    key, secret = site.api_keys.create("lab", KeyLimits())
    for sent in ("none", "sk-proj-abc", secret):
        assert client.post("/v1/chat/completions", json=CHAT, headers=with_key(sent)).status_code == 200
    for sent in ("uk_", "uk_000000000000_" + 43 * "a", secret[:-1]):
        answer = client.post("/v1/chat/completions", json=CHAT, headers=with_key(sent))
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.json["error"]["code"] == "invalid_key"
        assert answer.json["error"]["type"] == "authentication_error"
    assert site.api_keys.revoke(key.id)
    for path in ("/v1/models", "/api/v2/swarm"):
        assert client.get(path, headers=with_key(secret)).status_code == 401
    answer = client.post("/api/v1/generate", data={"inputs": "Hi"}, headers=with_key(secret))
    assert (answer.status_code, answer.json["error"]["code"]) == (401, "invalid_key")
    assert client.get("/", headers=with_key(secret)).status_code == 200  # a page has no keys


GENERATING = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/api/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/umbel/fake-1b"),
    ("POST", "/api/v1/generate"),
    ("GET", "/api/v2/generate"),
]


@pytest.mark.parametrize(("method", "path"), GENERATING)
def test_where_keys_are_required_programs_need_one_and_the_sites_pages_none(method: str, path: str) -> None:
    site, client = site_with(require_key=True)
    _key, secret = site.api_keys.create("lab", KeyLimits())
    fields = {"json": CHAT | {"prompt": "Hi", "input": "Hi", "inputs": "Hi"}} if method == "POST" else {}
    for headers in ({}, with_key("sk-abc"), {"Origin": "https://elsewhere.example"}):
        answer = client.open(path, method=method, headers=headers, **fields)
        assert (answer.status_code, answer.json["error"]["code"]) == (401, "key_required")
    for headers in (with_key(secret), OWN, {"Sec-Fetch-Site": "same-origin"}):
        answer = client.open(path, method=method, headers=headers, **fields)
        assert answer.status_code != 401


def test_a_key_lets_programs_into_a_site_that_is_not_public() -> None:
    site, client = site_with(public_api=False)
    _key, secret = site.api_keys.create("lab", KeyLimits())
    for path, fields in (("/v1/chat/completions", {"json": CHAT}), ("/api/v1/generate?strict=1",
                         {"data": {"inputs": "Hi", "max_new_tokens": "1"}})):  # fmt: skip
        assert client.post(path, **fields).status_code == 403
        assert client.post(path, headers=with_key(secret), **fields).status_code == 200


def test_where_keys_are_required_the_swarm_and_the_probes_stay_open() -> None:
    _site, client = site_with(require_key=True)
    for path in ("/", "/swarm", "/api/v1/state", "/api/v2/swarm", "/healthz", "/readyz", "/health/live", "/metrics"):
        assert client.get(path).status_code == 200, path
    assert client.options("/v1/chat/completions", headers={"Origin": "https://a.example"}).status_code == 200


def test_the_limits_of_a_key_hold_for_the_apis() -> None:
    site, client = site_with()
    _rare, rare = site.api_keys.create("rare", KeyLimits(requests_per_minute=1))
    _short, short = site.api_keys.create("short", KeyLimits(tokens_per_day=3))
    site.models.find(None).script = ["a", "b", "c", "d", "</s>"]  # type: ignore[attr-defined]
    for sent, tokens in ((rare, 5), (short, 3)):
        answer = client.post("/v1/chat/completions", json=CHAT, headers=with_key(sent))
        assert answer.json["usage"]["completion_tokens"] == tokens
        answer = client.post("/v1/chat/completions", json=CHAT, headers=with_key(sent))
        assert (answer.status_code, answer.json["error"]["code"]) == (429, "rate_limit_exceeded")
        answer = client.post("/api/v1/generate?strict=1", data={"inputs": "Hi", "max_new_tokens": "2"},
                             headers=with_key(sent))  # fmt: skip
        assert (answer.status_code, answer.json["error"]["code"]) == (429, "limit_exceeded")
        answer = client.post("/v1/embeddings", json={"input": "Hi"}, headers=with_key(sent))
        assert answer.status_code == 429
    assert client.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_sessions_of_a_key_are_counted_while_they_last() -> None:
    site, client = site_with()
    key, secret = site.api_keys.create("one", KeyLimits(sessions=1))
    with site.key_usage.session(key.quota):
        answer = client.post("/v1/chat/completions", json=CHAT, headers=with_key(secret))
        assert (answer.status_code, answer.json["error"]["code"]) == (429, "rate_limit_exceeded")
        with site.key_usage.session(None):
            assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
    for _ in range(2):
        assert client.post("/v1/chat/completions", json=CHAT, headers=with_key(secret)).status_code == 200


def test_a_key_that_cannot_be_looked_up_is_told_so_and_others_are_answered(tmp_path) -> None:
    model = FakeModel(script=["Hello", "</s>"])
    config = SiteConfig(database_url=f"postgresql://umbel@/nothing?host={tmp_path}")
    app = create_app(config, ModelRegistry([ModelSource(model.name, lambda: model)]))
    site_of(app).models.load()
    client = app.test_client()
    sent = with_key("uk_000000000000_" + 43 * "a")
    answer = client.post("/v1/chat/completions", json=CHAT, headers=sent)
    assert (answer.status_code, answer.json["error"]["code"]) == (503, "database_unavailable")
    assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
    assert client.get("/").status_code == 200
    assert client.get("/healthz", headers=sent).status_code == 200


def test_a_hash_of_256_random_bits_is_what_the_docstring_promises() -> None:
    secrets = {ApiKeys(Database(IN_MEMORY)).create("n", KeyLimits())[1] for _ in range(3)}
    assert len(secrets) == 3
    assert all(len(module._hash(secret)) == 64 for secret in secrets)
