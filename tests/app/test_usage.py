"""What was used is counted by day, key and model, outlives outages and restarts, and is shown to those it concerns."""

import json
import logging
import threading
import time
from pathlib import Path

import httpx
import pytest
from flask.testing import FlaskClient
from sqlalchemy import select

from app.api_keys import ApiKeys, KeyLimits
from app.cli import main
from app.config import SiteConfig
from app.database import IN_MEMORY, Database
from app.factory import create_app, site_of
from app.model_registry import ModelRegistry, ModelSource
from app.site import Site
from app.tables import usage
from app.usage import DAY_S, KEPT_DAYS, Amount, UsageBook, UsageRow
from app.usage_replies import date_of
from swarm_protocol.errors import CacheFullError
from tests.app.databases import PostgresServer
from tests.app.fake_swarm import FakeModel
from tests.app.site_process import running_site
from tests.app.socket_client import Client

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
NOON = 20_000 * DAY_S + DAY_S / 2


def amounts(book: UsageBook, key_id: str | None = None) -> list[tuple[str, str, Amount]]:
    return [(row.key_id, row.model, row.amount) for row in book.rows(1, key_id)]


# in the database


def test_amounts_add_up_by_key_and_model(database: Database) -> None:
    book = UsageBook(database)
    book.count("uk_1", "a", Amount(1, 10, 5))
    book.count("uk_1", "a", Amount(1, 20, 0, 1))
    book.count("uk_1", "b", Amount(1, 1, 1))
    book.count(None, "a", Amount(1, 2, 3))
    assert amounts(book) == []
    book.flush()
    book.count("uk_1", "a", Amount(1, 1, 1))
    book.flush()
    book.flush()
    assert amounts(book, "uk_1") == [("uk_1", "a", Amount(3, 31, 6, 1)), ("uk_1", "b", Amount(1, 1, 1))]
    assert amounts(book)[0] == ("", "a", Amount(1, 2, 3))
    assert amounts(book, "") == [("", "a", Amount(1, 2, 3))]


def test_days_are_those_of_utc_and_end(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [NOON]
    monkeypatch.setattr("time.time", lambda: clock[0])
    book = UsageBook(database)
    for _ in range(3):
        book.count("uk_1", "a", Amount(1))
        clock[0] += DAY_S
    book.flush()
    clock[0] -= DAY_S
    assert [row.day for row in book.rows(30)] == [20_000, 20_001, 20_002]
    assert [row.day for row in book.rows(2)] == [20_001, 20_002]
    assert book.rows(1) == [UsageRow(20_002, "uk_1", "a", Amount(1))]
    assert date_of(20_000) == "2024-10-04"
    clock[0] = NOON + (KEPT_DAYS + 2) * DAY_S
    book.count("uk_1", "a", Amount(1))
    book.flush()
    with database.reading() as connection:
        assert connection is not None
        assert sorted(connection.scalars(select(usage.c.day))) == [20_002, 20_002 + KEPT_DAYS]


def test_processes_and_threads_add_to_the_same_rows(database: Database, database_url: str) -> None:
    other = Database(database_url)
    books = [UsageBook(database), UsageBook(other)]

    def use(book: UsageBook) -> None:
        for number in range(20):
            book.count(f"uk_{number % 3}", "a", Amount(1, 2, 3))
            book.flush()

    threads = [threading.Thread(target=use, args=(book,)) for book in books * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for book in books:  # a thread may have found another one's flush under way
        book.flush()
    assert sum((row.amount for row in books[0].rows(1)), Amount()) == Amount(80, 160, 240)
    other.close()


def test_what_cannot_be_written_waits_and_is_logged_once(database: Database, caplog: pytest.LogCaptureFixture,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("app.usage.MAX_WAITING", 3)
    book = UsageBook(database)
    with database.writing() as connection:
        connection.exec_driver_sql("ALTER TABLE usage RENAME TO elsewhere")
    for number in range(6):
        book.count(f"uk_{number}", "a", Amount(1))
        book.flush()
        book.count("uk_0", "a", Amount(1))
    assert caplog.text.count("usage cannot be written") == 1
    monkeypatch.setattr("app.database.PAUSE_S", 0.0)
    with database.writing() as connection:
        connection.exec_driver_sql("ALTER TABLE elsewhere RENAME TO usage")
    book.flush()
    assert amounts(book) == [("uk_0", "a", Amount(7)), ("uk_1", "a", Amount(1)), ("uk_2", "a", Amount(1))]


def test_visitors_alone_make_no_file(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/site.db")
    book = UsageBook(database)
    book.count(None, "a", Amount(1))
    book.flush()
    assert list(tmp_path.iterdir()) == []
    database.upgrade()
    book.flush()
    assert amounts(book) == [("", "a", Amount(1))]
    database.close()


def test_the_command_shows_a_table_or_json(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UMBEL_DATABASE_URL", database_url)
    book = UsageBook(database)
    book.count("uk_1", "a", Amount(2, 30, 4, 1))
    book.count(None, "a", Amount(1, 1, 1))
    book.flush()
    assert main(["usage"]) == 0
    head, nobody, key, total = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head[:3] == ["day", "key", "model"]
    assert nobody[1:] == ["anonymous", "a", "1", "1", "1", "0"]
    assert key[1:] == ["uk_1", "a", "2", "30", "4", "1"]
    assert total == ["all", "3", "31", "5", "1"]
    assert main(["usage", "--key", "anonymous", "--days", "1", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert told.pop("date") == date_of(int(time.time() // DAY_S))
    assert told == {"key": None, "model": "a", "requests": 1, "prompt_tokens": 1, "answer_tokens": 1, "errors": 0}
    assert main(["usage", "--days", "0"]) == 2


# at the site


def site_with(model: FakeModel) -> tuple[Site, FlaskClient]:
    app = create_app(SiteConfig(database_url=IN_MEMORY), ModelRegistry([ModelSource(model.name, lambda: model)]))
    site_of(app).models.load()
    return site_of(app), app.test_client()


def test_every_api_counts_for_the_key_that_was_sent() -> None:
    model = FakeModel(script=["Hello", " you", "</s>"])
    site, client = site_with(model)
    key, secret = site.api_keys.create("lab", KeyLimits(tokens_per_day=500))
    sent = {"Authorization": f"Bearer {secret}"}
    answer = client.post("/v1/chat/completions", json=CHAT, headers=sent).json["usage"]
    client.post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 1}, headers=sent)
    client.post("/api/v1/generate", data={"inputs": "Hi", "max_new_tokens": "2"}, headers=sent)
    client.post("/v1/embeddings", json={"input": "Hi"}, headers=sent)
    client.post("/v1/chat/completions", json=CHAT)
    model.error_at = (1, CacheFullError(1, 0))
    assert client.post("/v1/chat/completions", json=CHAT, headers=sent).status_code == 503
    reply = client.get("/api/v2/usage?days=2", headers=sent).json
    assert (reply["key"], reply["name"], reply["limits"]["tokens_per_day"]) == (key.id, "lab", 500)
    (day,) = reply["days"]
    assert (day["model"], day["requests"], day["errors"]) == (model.name, 6, 1)
    assert day["answer_tokens"] == answer["completion_tokens"] + 2 + 2 + 1
    assert day["prompt_tokens"] > answer["prompt_tokens"]
    assert [row.amount.requests for row in site.usage.rows(1, "")] == [1]


def test_usage_is_shown_to_the_holder_of_a_key_alone() -> None:
    site, client = site_with(FakeModel())
    _key, secret = site.api_keys.create("lab", KeyLimits())
    site.usage.count("uk_other", "m", Amount(1))
    answer = client.get("/api/v2/usage")
    assert (answer.status_code, answer.json["error"]["code"]) == (401, "key_required")
    sent = {"Authorization": f"Bearer {secret}"}
    assert client.get("/api/v2/usage", headers=sent).json["days"] == []
    for days in ("0", "401", "-1", "x", "²", "1e1", "9" * 20):
        answer = client.get("/api/v2/usage", query_string={"days": days}, headers=sent)
        assert (answer.status_code, answer.json["error"]["code"]) == (400, "invalid_request")


def test_what_was_counted_is_written_when_a_site_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    url = f"sqlite:///{tmp_path}/site.db"
    database = Database(url)
    database.upgrade()
    key, secret = ApiKeys(database).create("lab", KeyLimits())
    shop = {"name": "shop", "origins": ["https://shop.example"]}
    with running_site("--delay", "0.001", settings={"database_url": url, "widget_keys": [shop]}) as site:
        sent = {"Authorization": f"Bearer {secret}"}
        assert httpx.post(f"{site.url}/v1/chat/completions", json=CHAT, headers=sent).status_code == 200
        with Client(site, additional_headers=sent) as legacy:
            legacy.open_legacy(max_length=64)
            legacy.send(type="generate", inputs="Hi", max_new_tokens=2)
            legacy.legacy_replies()
        widget_key = httpx.get(f"{site.url}/test/widget-keys").json()["shop"]
        token = httpx.get(f"{site.url}/embed/{widget_key}/token").json()["token"]
        with Client(site) as native:
            native.open(embed=token)
            native.generate("hi", max_new_tokens=3)
            native.receive_until("done")
    used = {row.key_id: row.amount for row in UsageBook(database).rows(1)}
    assert used[key.id].requests == 2
    assert used[widget_key] == Amount(1, used[widget_key].prompt_tokens, 3)
    database.close()


def test_a_site_goes_on_while_its_postgresql_is_away(postgres: PostgresServer) -> None:
    url = postgres.new_database()
    database = Database(url)
    database.upgrade()
    key, secret = ApiKeys(database).create("lab", KeyLimits())
    with running_site("--delay", "0.001", settings={"database_url": url}) as site:

        def chat(headers: dict[str, str] | None = None) -> httpx.Response:
            return httpx.post(f"{site.url}/v1/chat/completions", json=CHAT, headers=headers, timeout=60)

        sent = {"Authorization": f"Bearer {secret}"}
        assert chat(sent).status_code == 200
        postgres.stop()
        try:
            deadline_s = time.monotonic() + 60
            while (answer := chat(sent)).status_code == 200:  # the key was read a moment ago
                assert time.monotonic() < deadline_s
                time.sleep(0.2)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_unavailable")
            for _ in range(3):
                assert chat().status_code == 200
                assert httpx.get(f"{site.url}/swarm").status_code == 200
        finally:
            postgres.start()
        deadline_s = time.monotonic() + 60
        while (answer := chat(sent)).status_code != 200:
            assert time.monotonic() < deadline_s
            time.sleep(0.2)
    used = {row.key_id: row.amount.requests for row in UsageBook(database).rows(1)}
    assert used[""] == 3  # those from while it was away, too
    assert used[key.id] >= 2
    database.close()
