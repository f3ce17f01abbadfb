"""Widget keys in their file, and the command that makes them."""

import json
from pathlib import Path

import pytest

from app.cli import main
from app.widget_keys import WidgetKeys
from app.widget_usage import WidgetUsage
from swarm_protocol.errors import ConfigError, LimitExceededError

SHOP = "https://shop.example"


def test_keys_are_kept_in_their_file_for_every_process(tmp_path: Path) -> None:
    path = tmp_path / "new" / "keys.json"
    keys, others = WidgetKeys(path), WidgetKeys(path)
    made = keys.create(name="shop", origins=["HTTPS://Shop.example:443/"], model="m", tokens_per_day=5)
    assert made.key.startswith("wk_")
    assert made.origins == (SHOP,)
    assert others.find(made.key) == made == WidgetKeys(path).find(made.key)
    second = others.create(name="other", origins=[SHOP, "http://localhost:8000"])
    assert [key.name for key in keys.list()] == ["shop", "other"]
    assert keys.revoke(made.key)
    found = others.find(made.key)
    assert found is not None
    assert not found.is_enabled
    assert others.find(second.key) == second
    assert not keys.revoke("wk_nobody")
    assert keys.find("wk_nobody") is None
    assert [each.name for each in path.parent.iterdir()] == ["keys.json"]


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
    keys = WidgetKeys()
    with pytest.raises(ConfigError):
        keys.create(name="shop", **values)  # type: ignore[arg-type]
    assert keys.list() == ()


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"key": "a"}]', '[{"key": "a", "origins": 5}]'])
def test_a_file_of_something_else_ends_the_start_and_changes_nothing_later(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.json"
    keys = WidgetKeys(path)
    made = keys.create(name="shop", origins=[SHOP])
    path.write_text(text)
    assert keys.find(made.key) == made
    with pytest.raises(ConfigError):
        WidgetKeys(path)


def test_the_command_makes_lists_and_revokes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.json"
    monkeypatch.setenv("UMBEL_WIDGET_KEYS_FILE", str(path))
    create = ["widget", "create", "--name", "shop", "--origin", SHOP, "--origin", "https://b.example"]
    assert main([*create, "--only-model", "m", "--system-prompt", "Sell.", "--requests-per-minute", "3"]) == 0
    key = capsys.readouterr().out.strip()
    (saved,) = json.loads(path.read_text())
    assert (saved["key"], saved["model"], saved["system_prompt"]) == (key, "m", "Sell.")
    assert saved["requests_per_minute"] == 3
    assert main(["widget", "revoke", key]) == 0
    assert main(["widget", "list"]) == 0
    shown = capsys.readouterr().out
    assert key in shown
    assert "revoked" in shown
    assert f"{SHOP} https://b.example" in shown
    assert main(["widget", "revoke", "wk_nobody"]) == 2
    assert "no widget key" in capsys.readouterr().err
    monkeypatch.delenv("UMBEL_WIDGET_KEYS_FILE")
    assert main(create) == 2


# limits


def test_questions_are_counted_by_the_minute_and_tokens_by_the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1_000_000.0]
    monkeypatch.setattr("time.time", lambda: clock[0])
    keys, usage = WidgetKeys(), WidgetUsage()
    key = keys.create(name="shop", origins=[SHOP], requests_per_minute=2, tokens_per_day=100)
    other = keys.create(name="other", origins=[SHOP])
    usage.ask(key)
    usage.ask(key)
    with pytest.raises(LimitExceededError, match="2 questions a minute"):
        usage.ask(key)
    for _ in range(100):
        usage.ask(other)
    assert usage.left(other) is None
    clock[0] += 60
    usage.ask(key)
    assert usage.left(key) == 100
    usage.count_tokens(key.key, 70)
    assert usage.left(key) == 30
    usage.count_tokens(key.key, 40)
    assert usage.left(key) == 0
    clock[0] += 60
    with pytest.raises(LimitExceededError, match="100 tokens of today"):
        usage.ask(key)
    clock[0] += 86400
    usage.ask(key)
    assert usage.left(key) == 100
