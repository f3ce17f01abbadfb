"""Bans: whom they meet, how they are kept, and how they end what runs, in every process."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from flask.testing import FlaskClient

from app.api_keys import ApiKeys, KeyLimits
from app.ban_rules import ban_list, ban_target
from app.bans import Bans
from app.caller import Caller
from app.cli import main
from app.config import SecurityConfig, SiteConfig
from app.database import IN_MEMORY, Database
from app.errors import BannedError, InvalidKeyError
from app.factory import create_app, site_of
from app.keeper import Chore, Keeper
from app.model_registry import ModelRegistry
from swarm_protocol.errors import ConfigError
from tests.app.site_process import SiteProcess, running_site
from tests.app.socket_client import Client

# whom they meet


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("192.0.2.7", "192.0.2.7/32"),
        (" 192.0.2.7/24", "192.0.2.0/24"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("2001:DB8::1", "2001:db8::1/128"),
        ("2001:db8::1/48", "2001:db8::/48"),
        ("::ffff:192.0.2.7", "192.0.2.7/32"),
        ("::ffff:192.0.2.0/120", "192.0.2.0/24"),
        ("uk_0123456789ab", "uk_0123456789ab"),
        ("uk_0123456789ab_secret", "uk_0123456789ab"),
        ("wk_0123456789abcdef", "wk_0123456789abcdef"),
    ],
)
def test_what_is_banned_has_one_form(text: str, target: str) -> None:
    assert ban_target(text) == target
    assert ban_target(target) == target


@pytest.mark.parametrize("text", ["", "everybody", "192.0.2.256", "192.0.2.0/33", "uk_", "uk_XYZ", "example.org"])
def test_what_cannot_be_banned_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        ban_target(text)


@pytest.mark.parametrize(
    ("address", "keys", "is_met"),
    [
        ("192.0.2.7", [], True),
        ("192.0.3.7", [], False),
        ("::ffff:192.0.2.7", [], True),
        ("198.51.100.9", [], True),
        ("198.51.100.8", [], False),
        ("2001:db8:1:2::3", [], True),
        ("2001:db8:1:3::3", [], False),
        ("fe80::1%eth0", [], False),
        ("", [], False),
        ("unix:", [], False),
        ("203.0.113.1", ["uk_0123456789ab"], True),
        ("203.0.113.1", [None, "uk_ffff"], False),
    ],
)
def test_a_list_meets_networks_addresses_and_keys(address: str, keys: list[str | None], is_met: bool) -> None:
    found = ban_list(["192.0.2.0/24", "198.51.100.9/32", "2001:db8:1:2::/64", "uk_0123456789ab"])
    assert found.meets(address, keys) is is_met
    assert not ban_list([]).meets(address, keys)
    assert ban_list(["0.0.0.0/0", "::/0"]).meets("2001:db8::1")


# in the database


def is_let_in(bans: Bans, caller: Caller) -> bool:
    try:
        bans.check(caller)
    except (BannedError, InvalidKeyError):
        return False
    return True


def test_a_ban_holds_in_other_processes_until_it_is_lifted(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.bans.STALE_S", 0.3)
    other = Database(database_url)
    bans, others = Bans(database), Bans(other)
    caller = Caller("192.0.2.7")
    assert is_let_in(others, caller)
    bans.add("192.0.2.0/24", "a flood", None)
    again = bans.add("192.0.2.9/24", "a flood again", 3600.0)
    assert bans.list() == (again,)
    assert not is_let_in(bans, caller)
    deadline_s = time.monotonic() + 60
    while is_let_in(others, caller):
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    assert others.remove("192.0.2.0/24")
    assert not others.remove("192.0.2.0/24")
    assert is_let_in(others, caller)
    other.close()


def test_a_ban_ends_by_itself(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    bans = Bans(database)
    bans.add("192.0.2.7", "", 60.0)
    bans.add("wk_0123456789abcdef", "", None)
    assert not is_let_in(bans, Caller("192.0.2.7"))
    assert not is_let_in(bans, Caller("", widget_key="wk_0123456789abcdef"))
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 61)
    bans.refresh()
    assert is_let_in(bans, Caller("192.0.2.7"))
    assert [ban.target for ban in bans.list()] == ["wk_0123456789abcdef"]


def test_a_key_that_is_revoked_while_it_is_used_is_met(database: Database) -> None:
    keys, bans = ApiKeys(database), Bans(database)
    key, _secret = keys.create("lab", KeyLimits(expires_s=3600.0))
    caller = Caller("192.0.2.7", key)
    assert is_let_in(bans, caller)
    keys.revoke(key.id)
    bans.refresh()
    with pytest.raises(InvalidKeyError):
        bans.check(caller)


def test_where_a_keeper_reads_the_list_no_request_does(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    bans, changed = Bans(database), Bans(database)
    bans.leave_to_keeper()
    changed.add("192.0.2.7", "", None)
    monkeypatch.setattr("app.bans.STALE_S", -1.0)
    with monkeypatch.context() as patched:
        patched.setattr(database, "reading", lambda: pytest.fail("a request read"))
        assert is_let_in(bans, Caller("192.0.2.7"))
    bans.refresh()
    assert not is_let_in(bans, Caller("192.0.2.7"))


def test_a_chore_that_fails_or_hangs_holds_up_no_other(caplog: pytest.LogCaptureFixture) -> None:
    hung, done = threading.Event(), threading.Event()

    def fail_first() -> None:
        fails.append(None)
        if len(fails) == 1:
            raise ZeroDivisionError
        done.set()

    fails: list[None] = []
    chores = [Chore("hanging", lambda: bool(hung.wait(60)) or None, 0.01), Chore("failing", fail_first, 0.01)]
    Keeper(chores, is_ending=hung.is_set).start()
    assert done.wait(60)
    assert "bug in the keeper: failing" in caplog.text
    hung.set()


def test_the_last_list_holds_while_the_database_is_away(database: Database) -> None:
    bans = Bans(database)
    bans.add("192.0.2.7", "", None)
    assert not is_let_in(bans, Caller("192.0.2.7"))
    with database.writing() as connection:
        connection.exec_driver_sql("DROP TABLE bans")
    bans.refresh()
    assert not is_let_in(bans, Caller("192.0.2.7"))
    assert is_let_in(bans, Caller("192.0.2.8"))


def test_the_command_adds_lists_and_removes(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UMBEL_DATABASE_URL", database_url)
    assert main(["ban", "add", "192.0.2.7/24", "--reason", "a flood", "--expires-in", "12h"]) == 0
    assert main(["ban", "add", "uk_0123456789ab"]) == 0
    capsys.readouterr()
    assert main(["ban", "list"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("192.0.2.0/24")
    assert first.endswith("a flood")
    assert second.endswith("for good")
    assert main(["ban", "remove", "192.0.2.0/24"]) == 0
    assert main(["ban", "remove", "192.0.2.0/24"]) == 2
    assert main(["ban", "add", "everybody"]) == 2
    assert [ban.target for ban in Bans(database).list()] == ["uk_0123456789ab"]


# at the site


def client_of(**security: object) -> tuple[Bans, FlaskClient]:
    config = SiteConfig(database_url=IN_MEMORY, security=SecurityConfig(**security))  # type: ignore[arg-type]
    app = create_app(config, ModelRegistry([]))
    return site_of(app).bans, app.test_client()


def test_pages_and_apis_are_closed_and_probes_stay_open() -> None:
    bans, client = client_of()
    bans.add("127.0.0.0/8", "secret reason", None)
    for path in ("/", "/swarm", "/static/js/chat.js", "/nothing"):
        answer = client.get(path)
        assert answer.status_code == 403, path
        assert answer.mimetype == "text/plain"
    for path in ("/v1/models", "/api/v2/swarm", "/api/v2/generate"):
        answer = client.get(path)
        assert (answer.status_code, answer.json["error"]["code"]) == (403, "banned")
        assert "secret reason" not in answer.text
    for path in ("/healthz", "/readyz", "/health/ready", "/metrics", "/v1/health"):
        assert client.get(path).status_code in (200, 503), path


def test_the_address_is_that_behind_the_proxies_that_are_believed() -> None:
    bans, client = client_of(trusted_proxies=1)
    bans.add("192.0.2.7", "", None)
    assert client.get("/", headers={"X-Forwarded-For": "192.0.2.7"}).status_code == 403
    assert client.get("/", headers={"X-Forwarded-For": "192.0.2.7, 192.0.2.8"}).status_code == 200
    unbelieved, direct = client_of()
    unbelieved.add("192.0.2.7", "", None)
    assert direct.get("/", headers={"X-Forwarded-For": "192.0.2.7"}).status_code == 200


# on a running site


@pytest.fixture
def kept_site(tmp_path: Path) -> Iterator[tuple[SiteProcess, Database]]:
    """A site that answers slowly, and its database, which this process changes."""
    url = f"sqlite:///{tmp_path}/site.db"
    database = Database(url)
    database.upgrade()
    # A token comes every 0.3 s, so that an answer of 100 lasts longer than any deadline here but the last.
    with running_site("--delay", "0.3", settings={"database_url": url, "security": {"trusted_proxies": 1}}) as process:
        yield process, database
    database.close()


def from_address(address: str, secret: str = "") -> dict[str, str]:
    return {"X-Forwarded-For": address} | ({"Authorization": f"Bearer {secret}"} if secret else {})


def end_of(client: Client) -> tuple[str, int]:
    """Return the code of the error that ended what a socket did, and why the socket was closed."""
    while True:
        event = client.receive(60)
        if "error" in event or event.get("type") == "error" or event.get("ok") is False:
            error = event.get("error", event)
            return str(error["code"]), client.close_code()


def test_answers_that_run_are_ended(kept_site: tuple[SiteProcess, Database]) -> None:
    site, database = kept_site
    key, secret = ApiKeys(database).create("lab", KeyLimits(sessions=1))
    body = {"messages": [{"role": "user", "content": "long"}], "stream": True, "max_tokens": 400}
    with (
        Client(site, additional_headers=from_address("192.0.2.1")) as native,
        Client(site, additional_headers=from_address("192.0.2.1")) as idle,
        Client(site, additional_headers=from_address("192.0.2.3", secret)) as keyed,
        httpx.stream("POST", f"{site.url}/v1/chat/completions", json=body, headers=from_address("192.0.2.2")) as stream,
    ):
        native.open(resume=True)
        native.generate("long", max_new_tokens=400)
        native.receive_until("delta")
        idle.open_legacy(max_length=64)
        keyed.open_legacy(max_length=600)
        keyed.send(type="generate", inputs="long", max_new_tokens=1, stop_sequence="never")
        keyed.receive(60)
        lines = stream.iter_lines()
        next(lines)
        with Client(site, additional_headers=from_address("192.0.2.3", secret)) as second:
            assert end_of(second) == ("limit_exceeded", 4429)
        began_s = time.monotonic()
        bans = Bans(database)
        bans.add("192.0.2.0/31", "", None)
        bans.add("192.0.2.2", "", None)
        ApiKeys(database).revoke(key.id)
        assert end_of(native) == ("banned", 4410)
        assert end_of(idle) == ("banned", 4410)
        assert end_of(keyed) == ("invalid_key", 4401)
        told = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert told[-1]["error"]["code"] == "banned"
        assert time.monotonic() - began_s < 60  # 400 tokens take two minutes
    assert httpx.get(site.url, headers=from_address("192.0.2.1")).status_code == 403
    assert httpx.get(site.url, headers=from_address("192.0.2.4")).status_code == 200
    site.wait_for(lambda counts: counts["open_sessions"] == 0 and counts["answers"] == 0, timeout_s=60)
