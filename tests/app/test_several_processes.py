"""Two sites with one PostgreSQL and one Redis: keys, bans, limits and usage are common, conversations are not."""

import time
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from app.api_keys import ApiKey, ApiKeys, KeyLimits
from app.bans import Bans
from app.database import Database
from app.widget_keys import WidgetKeys
from tests.app.databases import PostgresServer
from tests.app.redis_process import redis_or_skip
from tests.app.site_process import SiteProcess, running_site
from tests.app.socket_client import Client

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
SOON_S = 15.0
"""For a change to hold everywhere: 5 s are promised, on a machine with nothing else to do."""


class Pair:
    """Two sites, and the database that an operator's commands would change."""

    def __init__(self, sites: list[SiteProcess], database: Database) -> None:
        self.sites, self.database = sites, database

    def key(self, **limits: int) -> tuple[ApiKey, dict[str, str]]:
        """Return a new key, and the header that shows it."""
        key, secret = ApiKeys(self.database).create("lab", KeyLimits(**limits))
        return key, {"Authorization": f"Bearer {secret}"}

    def ask(self, number: int, headers: dict[str, str]) -> httpx.Response:
        return httpx.post(f"{self.sites[number].url}/v1/chat/completions", json=CHAT, headers=headers, timeout=20)

    def wait_for_status(self, headers: dict[str, str], status: int) -> None:
        """Return when both sites answer so."""
        for number in range(2):
            deadline_s = time.monotonic() + SOON_S
            while (found := self.ask(number, headers)).status_code != status:
                assert time.monotonic() < deadline_s, found.text
                time.sleep(0.2)


@pytest.fixture(scope="module")
def pair(postgres: PostgresServer) -> Iterator[Pair]:
    with ExitStack() as stack:
        redis = redis_or_skip()
        stack.callback(redis.close)
        url = postgres.new_database()
        database = Database(url)
        stack.callback(database.close)
        database.upgrade()
        settings = {
            "database_url": url,
            "limits": {"limits_url": redis.url},
            "security": {"signing_secrets": ["a secret of 16 characters and more"]},
        }
        sites = [stack.enter_context(running_site("--delay", "0.01", settings=settings)) for _ in range(2)]
        yield Pair(sites, database)


def test_a_limit_that_is_used_up_at_one_is_used_up_at_the_other(pair: Pair) -> None:
    _, rare = pair.key(requests_per_minute=3)
    assert [pair.ask(number % 2, rare).status_code for number in range(4)] == [200, 200, 200, 429]
    assert pair.ask(0, rare).status_code == 429
    _, short = pair.key(tokens_per_day=6)
    assert [pair.ask(number, short).json()["usage"]["completion_tokens"] for number in range(2)] == [4, 2]
    assert [pair.ask(number, short).status_code for number in range(2)] == [429, 429]


def test_a_session_at_one_is_a_session_at_the_other(pair: Pair) -> None:
    _, headers = pair.key(sessions=1)
    with Client(pair.sites[0], additional_headers=headers) as client:
        assert client.open()["type"] == "opened"
        assert pair.ask(1, headers).status_code == 429
    deadline_s = time.monotonic() + SOON_S
    while pair.ask(1, headers).status_code != 200:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def test_keys_that_are_made_revoked_and_banned_are_so_at_both(pair: Pair) -> None:
    key, headers = pair.key()
    pair.wait_for_status(headers, 200)
    Bans(pair.database).add(key.id, reason="a test", expires_s=None)
    pair.wait_for_status(headers, 403)
    Bans(pair.database).remove(key.id)
    pair.wait_for_status(headers, 200)
    ApiKeys(pair.database).revoke(key.id)
    pair.wait_for_status(headers, 401)


def test_a_widget_key_and_its_token_are_good_at_both(pair: Pair) -> None:
    origin = "https://shop.example"
    key = WidgetKeys(pair.database).create(name="shop", origins=[origin])
    pages = [httpx.get(f"{site.url}/embed/{key.key}") for site in pair.sites]
    assert all(origin in page.headers["Content-Security-Policy"] for page in pages)


def test_whoever_comes_back_to_the_other_process_is_told_and_may_begin_anew(pair: Pair) -> None:
    with Client(pair.sites[0]) as client:
        opened = client.open(resume=True)
        client.generate("Tell me something long", max_new_tokens=500)
        client.receive_until("delta")
    with Client(pair.sites[1]) as client:
        client.send(type="resume", token=opened["resume_token"], id="a", from_seq=1)
        answer = client.receive()
        assert (answer["type"], answer["resumed"], answer["reason"]) == ("resumed", False, "unknown")
        assert client.open()["type"] == "opened"
        client.generate("Hi", max_new_tokens=3)
        client.receive_until("done")


def test_usage_of_both_adds_up(pair: Pair) -> None:
    _, headers = pair.key()
    for number in (0, 1, 1):
        assert pair.ask(number, headers).status_code == 200
    deadline_s = time.monotonic() + SOON_S
    while True:
        found = httpx.get(f"{pair.sites[0].url}/api/v2/usage", headers=headers).json()
        if sum(day["requests"] for day in found["days"]) == 3:
            return
        assert time.monotonic() < deadline_s, found
        time.sleep(0.2)
