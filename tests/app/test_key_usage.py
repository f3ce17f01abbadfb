"""What keys and addresses may use holds for every API, in memory and in Redis, and clients are told."""

from collections.abc import Iterator

import pytest
from flask.testing import FlaskClient

from app.api_keys import KeyLimits
from app.config import AddressLimits, SiteConfig
from app.database import IN_MEMORY
from app.factory import create_app, site_of
from app.key_usage import KeyUsage, Quota, QuotaError, address_quota, counted_address, standing_headers
from app.limit_store import MemoryCounts, RedisCounts, new_lease
from app.model_registry import ModelRegistry, ModelSource
from app.site import Site
from tests.app.fake_swarm import FakeModel
from tests.app.redis_process import RedisProcess, redis_or_skip

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisProcess]:
    process = redis_or_skip()
    yield process
    process.close()


@pytest.fixture(params=["memory", "redis"])
def usage(request: pytest.FixtureRequest) -> KeyUsage:
    if request.param == "memory":
        return KeyUsage(MemoryCounts())
    return KeyUsage(RedisCounts(request.getfixturevalue("redis").url))


def a_site(limits: AddressLimits) -> tuple[Site, FlaskClient]:
    model = FakeModel(script=["a", "b", "c", "d", "</s>"])
    config = SiteConfig(database_url=IN_MEMORY, limits=limits)
    app = create_app(config, ModelRegistry([ModelSource(model.name, lambda: model)]))
    site_of(app).models.load()
    return site_of(app), app.test_client()


@pytest.mark.parametrize(
    ("address", "counted"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("unix", "unix"),
        ("", ""),
    ],
)
def test_an_address_counts_as_what_one_household_has(address: str, counted: str) -> None:
    assert counted_address(address) == counted


def test_addresses_have_no_limits_unless_the_operator_sets_some() -> None:
    assert address_quota("203.0.113.7", AddressLimits()) is None
    quota = address_quota("203.0.113.7", AddressLimits(address_tokens_per_day=9))
    assert quota == Quota("address:203.0.113.7", None, 9, None, "your address")


def test_what_is_used_up_is_refused_until_there_is_some_again(usage: KeyUsage) -> None:
    quota = Quota(new_lease(), requests_per_minute=2, tokens_per_day=10, sessions=1)
    usage.ask(quota)
    usage.ask(quota)
    with pytest.raises(QuotaError, match="2 requests a minute") as caught:
        usage.ask(quota)
    assert 1 <= caught.value.retry_after_s <= 60
    assert (caught.value.code, caught.value.retryable) == ("limit_exceeded", True)
    usage.count_tokens(quota, 4)
    assert usage.left(quota) == 6
    usage.count_tokens(quota, 40)  # an answer that had begun
    assert usage.left(quota) == 0
    with pytest.raises(QuotaError, match="10 tokens of today") as caught:
        usage.ask(quota)
    assert 1 <= caught.value.retry_after_s <= 86_400
    with usage.session(quota):
        usage.renew()
        with pytest.raises(QuotaError, match="1 sessions at once"), usage.session(quota):
            pass
    with usage.session(quota):
        pass


def test_a_session_whose_holder_fails_is_free_again(usage: KeyUsage) -> None:
    quota = Quota(new_lease(), sessions=1)
    with pytest.raises(ZeroDivisionError), usage.session(quota):
        raise ZeroDivisionError
    with usage.session(quota):
        pass


def test_without_limits_nothing_is_counted(usage: KeyUsage) -> None:
    quota = Quota(new_lease())
    for _ in range(3):
        usage.ask(quota)
        usage.count_tokens(quota, 5)
    assert usage.left(quota) is None
    assert standing_headers(usage.requests(quota), usage.tokens(quota)) == {}


def test_an_address_is_limited_in_every_api() -> None:
    _, client = a_site(AddressLimits(address_requests_per_minute=3))
    answers = [
        client.post("/v1/chat/completions", json=CHAT),
        client.post("/api/v1/generate?strict=1", data={"inputs": "Hi", "max_new_tokens": "2"}),
        client.post("/v1/embeddings", json={"input": "Hi"}),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    refused = client.post("/v1/chat/completions", json=CHAT)
    assert (refused.status_code, refused.json["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    refused = client.post("/api/v1/generate?strict=1", data={"inputs": "Hi", "max_new_tokens": "2"})
    assert (refused.status_code, refused.json["error"]["code"]) == (429, "limit_exceeded")
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    other = {"REMOTE_ADDR": "203.0.113.9"}
    assert client.post("/v1/chat/completions", json=CHAT, environ_overrides=other).status_code == 200
    assert client.get("/v1/models").status_code == 200


def test_an_answer_ends_with_the_days_tokens() -> None:
    _, client = a_site(AddressLimits(address_tokens_per_day=3))
    answer = client.post("/v1/chat/completions", json=CHAT)
    assert answer.json["usage"]["completion_tokens"] == 3
    assert answer.json["choices"][0]["finish_reason"] == "length"
    assert client.post("/v1/chat/completions", json=CHAT).status_code == 429


def test_clients_of_openais_api_see_what_is_left() -> None:
    _, client = a_site(AddressLimits(address_requests_per_minute=5, address_tokens_per_day=100))
    headers = client.post("/v1/chat/completions", json=CHAT).headers
    assert headers["x-ratelimit-limit-requests"] == "5"
    assert headers["x-ratelimit-remaining-requests"] == "4"
    assert headers["x-ratelimit-limit-tokens"] == "100"
    assert headers["x-ratelimit-remaining-tokens"] == "95"
    assert headers["x-ratelimit-reset-tokens"].endswith("s")
    assert "x-ratelimit-limit-requests" not in client.get("/v1/models").headers


def test_a_key_counts_for_itself_and_not_for_its_address() -> None:
    site, client = a_site(AddressLimits(address_requests_per_minute=1))
    _, secret = site.api_keys.create("lab", KeyLimits())
    held = {"Authorization": f"Bearer {secret}"}
    assert [client.post("/v1/chat/completions", json=CHAT, headers=held).status_code for _ in range(3)] == [200] * 3
    assert [client.post("/v1/chat/completions", json=CHAT).status_code for _ in range(2)] == [200, 429]


def test_sites_that_share_redis_share_the_limits(redis: RedisProcess) -> None:
    address = {"REMOTE_ADDR": "203.0.113.77"}
    limits = AddressLimits(limits_url=redis.url, address_requests_per_minute=3)
    clients = [a_site(limits)[1] for _ in range(2)]
    statuses = [
        clients[number % 2].post("/v1/chat/completions", json=CHAT, environ_overrides=address).status_code
        for number in range(5)
    ]
    assert statuses == [200, 200, 200, 429, 429]
