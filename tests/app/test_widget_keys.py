"""Widget keys in the database, and the command that makes them."""

import time
from dataclasses import replace

import pytest

from app.cli import main
from app.database import IN_MEMORY, Database
from app.key_usage import KeyUsage
from app.widget_keys import WidgetKeys
from swarm_protocol.errors import ConfigError, LimitExceededError

SHOP = "https://shop.example"


def test_keys_are_kept_for_every_process(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.fresh.FRESH_S", 0.3)
    keys, others = WidgetKeys(database), WidgetKeys(Database(database_url))
    made = keys.create(name="shop", origins=["HTTPS://Shop.example:443/"], model="m", tokens_per_day=5)
    assert made.key.startswith("wk_")
    assert made.origins == (SHOP,)
    assert others.find(made.key) == made == keys.find(made.key)
    second = others.create(name="other", origins=[SHOP, "http://localhost:8000"])
    assert [key.name for key in keys.list()] == ["shop", "other"]
    assert keys.find(second.key) == second
    assert keys.revoke(made.key)
    deadline_s = time.monotonic() + 60
    while (found := others.find(made.key)) is not None and found.is_enabled:
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    assert found == replace(made, is_enabled=False)
    assert others.find(second.key) == second
    assert not keys.revoke("wk_nobody")
    assert keys.find("wk_nobody") is None
    others._database.close()


@pytest.mark.parametrize(
    "values",
    [
        {"origins": []},
        {"origins": ["shop.example"]},
        {"origins": [SHOP, "*"]},
        {"origins": [SHOP], "theme": "pink"},
        {"origins": [SHOP], "tokens_per_day": 0},
    ],
)
def test_what_no_key_can_have_is_refused(values: dict[str, object]) -> None:
    keys = WidgetKeys(Database(IN_MEMORY))
    with pytest.raises(ConfigError):
        keys.create(name="shop", **values)  # type: ignore[arg-type]
    assert keys.list() == ()


def test_the_command_makes_lists_and_revokes(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UMBEL_DATABASE_URL", database_url)
    create = ["widget", "create", "--name", "shop", "--origin", SHOP, "--origin", "https://b.example"]
    assert main([*create, "--only-model", "m", "--system-prompt", "Sell.", "--requests-per-minute", "3"]) == 0
    key = capsys.readouterr().out.strip()
    (saved,) = WidgetKeys(database).list()
    assert (saved.key, saved.model, saved.system_prompt) == (key, "m", "Sell.")
    assert saved.requests_per_minute == 3
    assert main(["widget", "revoke", key]) == 0
    assert main(["widget", "list"]) == 0
    shown = capsys.readouterr().out
    assert key in shown
    assert "revoked" in shown
    assert f"{SHOP} https://b.example" in shown
    assert main(["widget", "revoke", "wk_nobody"]) == 2
    assert "no widget key" in capsys.readouterr().err


# limits


def test_questions_are_counted_by_the_minute_and_tokens_by_the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1_000_000.0]
    monkeypatch.setattr("time.time", lambda: clock[0])
    keys, usage = WidgetKeys(Database(IN_MEMORY)), KeyUsage()
    key = keys.create(name="shop", origins=[SHOP], requests_per_minute=2, tokens_per_day=100)
    other = keys.create(name="other", origins=[SHOP])
    usage.ask(key.quota)
    usage.ask(key.quota)
    with pytest.raises(LimitExceededError, match="2 requests a minute"):
        usage.ask(key.quota)
    for _ in range(100):
        usage.ask(other.quota)
    assert usage.left(other.quota) is None
    clock[0] += 61
    usage.ask(key.quota)
    assert usage.left(key.quota) == 100
    usage.count_tokens(key.quota, 70)
    assert usage.left(key.quota) == 30
    usage.count_tokens(key.quota, 40)
    assert usage.left(key.quota) == 0
    clock[0] += 60
    with pytest.raises(LimitExceededError, match="100 tokens of today"):
        usage.ask(key.quota)
    clock[0] += 86400
    usage.ask(key.quota)
    assert usage.left(key.quota) == 100
