"""Requests, tokens and sessions are counted alike in memory and in Redis, and Redis may go away."""

import logging
from collections.abc import Iterator

import pytest

from app import limit_store
from app.limit_store import (
    Counts,
    MemoryCounts,
    RedisCounts,
    SharedCounts,
    counts_of,
    new_lease,
    until_tomorrow_s,
)
from swarm_protocol.errors import ConfigError
from tests.app.redis_process import RedisProcess, redis_or_skip


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisProcess]:
    process = redis_or_skip()
    yield process
    process.close()


@pytest.fixture(params=["memory", "redis"])
def counts(request: pytest.FixtureRequest) -> Counts:
    if request.param == "memory":
        return MemoryCounts()
    return RedisCounts(request.getfixturevalue("redis").url)


@pytest.fixture
def account() -> str:
    return f"a:{new_lease()}"


def test_so_many_requests_a_minute_and_no_more(counts: Counts, account: str) -> None:
    assert counts.requests_left(account, 3) == (3, 0.0)
    assert [counts.take_request(account, 3) for _ in range(3)] == [None] * 3
    wait_s = counts.take_request(account, 3)
    assert wait_s is not None
    assert 0 < wait_s <= 60
    left, until_s = counts.requests_left(account, 3)
    assert left == 0
    assert 0 < until_s <= 60
    assert counts.take_request(f"{account}-other", 3) is None


def test_tokens_add_up_until_the_day_ends(counts: Counts, account: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert counts.tokens(account) == 0
    counts.add_tokens(account, 7)
    counts.add_tokens(account, 0)
    counts.add_tokens(account, 5)
    assert counts.tokens(account) == 12
    now_s = limit_store.time.time()
    with monkeypatch.context() as patch:
        patch.setattr(limit_store.time, "time", lambda: now_s + until_tomorrow_s(now_s) + 1)
        assert counts.tokens(account) == 0


def test_so_many_sessions_at_once(counts: Counts, account: str) -> None:
    first, second, third = new_lease(), new_lease(), new_lease()
    assert counts.take_lease(account, 2, first)
    assert counts.take_lease(account, 2, second)
    assert not counts.take_lease(account, 2, third)
    assert counts.take_lease(account, 2, first)  # again
    counts.end_lease(account, first)
    counts.end_lease(account, first)
    assert counts.take_lease(account, 2, third)
    assert not counts.take_lease(account, 2, first)


def test_processes_that_share_redis_share_what_is_used(redis: RedisProcess, account: str) -> None:
    one, other = RedisCounts(redis.url), RedisCounts(redis.url)
    assert one.take_request(account, 2) is None
    assert other.take_request(account, 2) is None
    assert one.take_request(account, 2) is not None
    one.add_tokens(account, 4)
    assert other.tokens(account) == 4
    lease = new_lease()
    assert one.take_lease(account, 1, lease)
    assert not other.take_lease(account, 1, new_lease())


def test_the_session_of_a_process_that_died_is_free_again(
    redis: RedisProcess, account: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, now_s = RedisCounts(redis.url), limit_store.time.time()
    assert counts.take_lease(account, 1, new_lease())
    with monkeypatch.context() as patch:
        patch.setattr(limit_store.time, "time", lambda: now_s + limit_store.LEASE_S - 5)
        assert not counts.take_lease(account, 1, new_lease())
        patch.setattr(limit_store.time, "time", lambda: now_s + limit_store.LEASE_S + 5)
        assert counts.take_lease(account, 1, new_lease())


def test_while_redis_is_away_this_process_counts(account: str, caplog: pytest.LogCaptureFixture) -> None:
    process, now_s = redis_or_skip(), 0.0
    counts = SharedCounts(RedisCounts(process.url), lambda: now_s)
    try:
        assert counts.take_request(account, 1) is None
        assert counts.take_request(account, 1) is not None
        process.kill()
        with caplog.at_level(logging.WARNING, logger="app.limit_store"):
            assert counts.take_request(account, 1) is None  # another count
            assert counts.is_away
            assert counts.take_request(account, 1) is not None
            lease = new_lease()
            assert counts.take_lease(account, 1, lease)
            assert not counts.take_lease(account, 1, new_lease())
            counts.end_lease(account, lease)
            counts.add_tokens(account, 3)
            assert counts.tokens(account) == 3
            now_s = limit_store.PAUSE_S + 1
            assert counts.tokens(account) == 3  # tried again, in vain
        assert len(caplog.records) == 1
        assert account not in caplog.text
        process.start()
        now_s = 3 * limit_store.PAUSE_S
        assert counts.take_request(account, 1) is None
        assert not counts.is_away
    finally:
        process.close()


def test_without_a_url_this_process_counts() -> None:
    assert isinstance(counts_of(""), MemoryCounts)


@pytest.mark.parametrize("url", ["memcached://here", "http://user:secret@here", "redis"])
def test_other_urls_are_refused_without_their_password(url: str) -> None:
    with pytest.raises(ConfigError, match="redis://") as caught:
        counts_of(url)
    assert "secret" not in str(caught.value)
