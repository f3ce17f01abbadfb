"""The widget as the site serves it: the loader, the pages of keys, and what a key decides about its sessions."""

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from itsdangerous import URLSafeTimedSerializer

from app import embed_tokens
from app.config import SecurityConfig, SiteConfig
from app.embed_pages import key_origins, loader_versions
from app.embed_tokens import EmbedTokens, address_prefix
from app.model_registry import ModelRegistry
from app.security import PAGE_POLICY, embed_policy
from app.site import Site
from tests.app.site_process import SiteProcess, running_site
from tests.app.socket_client import Client

FOLDER = Path(__file__).resolve().parents[2] / "static" / "widget"
MANIFEST = json.loads((FOLDER / "MANIFEST.json").read_text())
MAX_LOADER_BYTES = 5000
SHOP = "https://shop.example"
KEYS: list[dict[str, Any]] = [
    {
        "name": "shop",
        "origins": [SHOP, "https://www.shop.example:8443"],
        "model": "umbel/fake-7b",
        "system_prompt": "Sell umbels.",
    },
    {"name": "plain", "origins": [SHOP]},
    {"name": "revoked", "origins": [SHOP]},
    {"name": "closing", "origins": [SHOP]},
    {"name": "short", "origins": [SHOP], "tokens_per_day": 3},
    {"name": "rare", "origins": [SHOP], "requests_per_minute": 1},
]


@pytest.fixture(scope="module")
def site() -> Iterator[SiteProcess]:
    """A site with two models and three widget keys."""
    arguments = ["--delay", "0.001", "--models", "umbel/fake-1b,umbel/fake-7b"]
    with running_site(*arguments, settings={"widget_keys": KEYS}) as process:
        yield process


def keys_of(site: SiteProcess) -> dict[str, str]:
    """Return the keys of the site by their names."""
    found: dict[str, str] = httpx.get(f"{site.url}/test/widget-keys").json()
    return found


def sha384(path: Path) -> str:
    return base64.b64encode(hashlib.sha384(path.read_bytes()).digest()).decode()


# the loader


@pytest.mark.parametrize("version", MANIFEST)
def test_the_loader_is_small_and_as_it_was_released(version: str) -> None:
    path = FOLDER / f"v{version}.js"
    assert len(gzip.compress(path.read_bytes(), 9)) <= MAX_LOADER_BYTES
    assert sha384(path) == MANIFEST[version]["sha384"]
    text = path.read_text()
    assert not re.search(
        r"\bimport\b|\bfetch\(|XMLHttpRequest|cookie|Storage|indexedDB|innerHTML|srcdoc|setAttribute\(.style", text
    )
    assert set(re.findall(r"https?://[^\"'`]+", text)) == {"http://www.w3.org/2000/svg"}


def test_the_newest_loader_was_made_of_the_source() -> None:
    newest = list(loader_versions())[-1]
    assert MANIFEST[newest]["source"] == sha384(FOLDER / "loader.js")
    assert f"version: '{newest}'" in (FOLDER / "loader.js").read_text()
    assert {path.name for path in FOLDER.glob("v*.js")} == {f"v{version}.js" for version in MANIFEST}


def test_the_loader_is_for_every_page_and_a_pinned_one_for_good(site: SiteProcess) -> None:
    newest, integrity = list(loader_versions().items())[-1]
    floating, pinned = (httpx.get(f"{site.url}/widget/v{version}.js") for version in ("1", newest))
    assert floating.content == pinned.content
    assert floating.headers["Cache-Control"] == "public, max-age=3600"
    assert "immutable" in pinned.headers["Cache-Control"]
    for response in (floating, pinned):
        assert response.headers["Content-Type"].startswith("text/javascript")
        assert response.headers["Cross-Origin-Resource-Policy"] == "cross-origin"
        assert response.headers["Access-Control-Allow-Origin"] == "*"
    assert integrity in httpx.get(f"{site.url}/widget").text
    for path in ("/widget/v2.js", "/widget/v1.99.0.js", "/widget/v../loader.js", "/widget/loader.js"):
        assert httpx.get(site.url + path).status_code == 404


# the page of a key


def test_the_page_of_a_key_may_be_framed_by_its_origins_only(site: SiteProcess) -> None:
    response = httpx.get(f"{site.url}/embed/{keys_of(site)['shop']}")
    assert response.status_code == 200
    policy = response.headers["Content-Security-Policy"]
    assert f"frame-ancestors 'self' {SHOP} https://www.shop.example:8443;" in policy
    assert policy.replace(f" 'self' {SHOP} https://www.shop.example:8443;", " 'none';") == PAGE_POLICY
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert "X-Frame-Options" not in response.headers
    assert "Set-Cookie" not in response.headers
    assert "Sell umbels" not in response.text  # the prompt is the site's own


def test_keys_that_are_not_in_use_all_look_alike(site: SiteProcess) -> None:
    httpx.post(f"{site.url}/test/revoke/{keys_of(site)['revoked']}")
    pages = [httpx.get(f"{site.url}/embed/{key}") for key in (keys_of(site)["revoked"], "wk_unknown", "%3Cb%3E")]
    assert {page.status_code for page in pages} == {404}
    assert len({page.text for page in pages}) == 1
    for page in pages:
        assert "frame-ancestors 'none'" in page.headers["Content-Security-Policy"]
        assert httpx.get(f"{page.url}/token").status_code == 404
    own = ("date", "x-request-id")
    assert len({str(sorted(item for item in page.headers.items() if item[0] not in own)) for page in pages}) == 1


def test_tokens_are_for_the_embed_page_itself(site: SiteProcess) -> None:
    address = f"{site.url}/embed/{keys_of(site)['shop']}/token"
    assert httpx.get(address, headers={"Sec-Fetch-Site": "same-origin"}).json()["token"]
    assert httpx.get(address, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 404


@pytest.mark.parametrize(
    "origin",
    ["https://a.example; script-src *", "https://a.example https://b.example", "*", "javascript:1", "", "null"],
)
def test_what_is_no_origin_reaches_no_header(origin: str) -> None:
    class Key:
        origins = (origin, "HTTPS://Good.example:443/")

    found = key_origins(Key())  # type: ignore[arg-type]
    assert found == ["https://good.example"]
    assert "frame-ancestors 'self' https://good.example;" in embed_policy(found)


# tokens


def test_a_token_is_good_where_it_was_given_out_and_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = EmbedTokens([b"old", b"new"])
    token = tokens.make("wk_a", "203.0.113.7")
    assert tokens.read(token, "203.0.113.250") == "wk_a"
    assert tokens.read(token, "203.0.114.7") is None
    assert EmbedTokens([b"new", b"newer"]).read(token, "203.0.113.7") == "wk_a"  # until its secret is retired
    assert EmbedTokens([b"newer"]).read(token, "203.0.113.7") is None
    assert tokens.read(token[:-2] + "xx", "203.0.113.7") is None
    assert tokens.read("", "203.0.113.7") is None
    others = URLSafeTimedSerializer([b"new"], salt=embed_tokens.SALT)
    assert tokens.read(str(others.dumps({"key": "wk_a"})), "203.0.113.7") is None
    monkeypatch.setattr(embed_tokens, "TOKEN_LIFE_S", -1)
    assert tokens.read(token, "203.0.113.7") is None


@pytest.mark.parametrize(
    ("address", "prefix"),
    [
        ("203.0.113.7", "203.0.113.0/24"),
        ("::ffff:203.0.113.7", "203.0.113.0/24"),
        ("2001:db8:1:2::3", "2001:db8:1::/48"),
        ("unix:", "unix:"),
    ],
)
def test_a_token_is_for_a_network(address: str, prefix: str) -> None:
    assert address_prefix(address) == prefix


# sessions


def token_of(site: SiteProcess, name: str) -> str:
    found: str = httpx.get(f"{site.url}/embed/{keys_of(site)[name]}/token").json()["token"]
    return found


def ask(client: Client, *messages: tuple[str, str]) -> str:
    """Send a conversation; return the answer."""
    sent = [{"role": role, "content": content} for role, content in messages]
    client.send(type="generate", id="a", messages=sent)
    return client.receive_until("done")[0]


def test_the_key_chooses_the_model_and_the_prompt(site: SiteProcess) -> None:
    with Client(site) as client:
        opened = client.open(model="umbel/fake-1b", embed=token_of(site, "shop"))
        assert opened["model"]["id"] == "umbel/fake-7b"
        assert ask(client, ("user", "prompt")) == "Sell umbels."
        told = ask(client, ("system", "Sell guns."), ("user", "prompt"))
        assert told == "Sell umbels.\n\nThe page that this chat is part of says about itself:\nSell guns."
        assert len(ask(client, ("system", "x" * 9000), ("user", "prompt"))) < 4200
        client.send(
            type="generate", id="b", messages=[{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
        )
        assert client.receive_until("error")[1]["code"] == "invalid_request"
        assert ask(client, ("user", "prompt")) == "Sell umbels."


def test_a_rewind_keeps_the_keys_prompt(site: SiteProcess) -> None:
    with Client(site) as client:
        client.open(embed=token_of(site, "shop"))
        ask(client, ("user", "brief"), ("assistant", "yes"), ("user", "brief"))
        client.send(type="rewind", messages=0)
        left = client.receive()["position"]
        client.send(type="rewind", messages=9)
        assert 0 < left == client.receive()["position"]


def test_a_key_without_a_model_or_prompt_leaves_the_sites_own(site: SiteProcess) -> None:
    with Client(site) as client:
        assert client.open(embed=token_of(site, "plain"))["model"]["id"] == "umbel/fake-1b"
        assert ask(client, ("user", "prompt")) == "none"


def test_a_session_is_opened_by_a_good_token_only(site: SiteProcess) -> None:
    with Client(site) as client:
        assert client.open(embed="forged")["code"] == "embed_expired"
        assert client.open(embed="x" * 1000)["code"] == "invalid_request"
        assert client.open(embed=token_of(site, "plain"))["type"] == "opened"


def test_a_revoked_key_ends_its_chats(site: SiteProcess) -> None:
    with Client(site) as client:
        token = token_of(site, "closing")
        client.open(embed=token)
        assert ask(client, ("user", "brief")) == " yes"
        httpx.post(f"{site.url}/test/revoke/{keys_of(site)['closing']}")
        client.send(type="generate", id="a", messages=[{"role": "user", "content": "brief"}])
        assert client.receive_until("error")[1]["code"] == "embed_closed"
        assert client.open(embed=token)["code"] == "embed_closed"


def test_a_keys_tokens_of_a_day_cut_the_answer_and_end_the_talk(site: SiteProcess) -> None:
    with Client(site) as client:
        client.open(embed=token_of(site, "short"))
        client.send(type="generate", id="a", messages=[{"role": "user", "content": "hi"}], params={"max_tokens": 50})
        done = client.receive_until("done")[1]
        assert (done["finish_reason"], done["usage"]["completion_tokens"]) == ("length", 3)
        client.send(type="generate", id="b", messages=[{"role": "user", "content": "hi"}])
        error = client.receive_until("error")[1]
        assert (error["code"], error["id"]) == ("limit_exceeded", "b")


def test_a_keys_questions_of_a_minute_count_over_all_its_readers(site: SiteProcess) -> None:
    with Client(site) as one, Client(site) as other:
        for client in (one, other):
            client.open(embed=token_of(site, "rare"))
        assert ask(one, ("user", "brief")) == " yes"
        other.send(type="generate", id="a", messages=[{"role": "user", "content": "brief"}])
        assert other.receive_until("error")[1]["code"] == "limit_exceeded"


def test_processes_with_one_secret_take_each_others_tokens() -> None:
    config = SiteConfig(security=SecurityConfig(signing_secrets=("first", "second")))
    one, other = (Site(config, ModelRegistry([])).embed_tokens for _ in range(2))
    assert other.read(one.make("wk_a", "192.0.2.1"), "192.0.2.1") == "wk_a"
    alone = Site(SiteConfig(), ModelRegistry([])).embed_tokens
    assert alone.read(one.make("wk_a", "192.0.2.1"), "192.0.2.1") is None
