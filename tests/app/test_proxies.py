"""Whose word the site takes for a reader's address, name and scheme."""

import pytest

from app.config import SecurityConfig, SiteConfig
from app.factory import create_app, site_of
from app.model_registry import ModelRegistry

FORWARDED = {"X-Forwarded-For": "6.6.6.6, 7.7.7.7", "X-Forwarded-Proto": "https", "X-Forwarded-Host": "chat.example"}


@pytest.mark.parametrize(
    ("trusted_proxies", "address"),
    [
        (0, "127.0.0.1"),
        (1, "7.7.7.7"),  # what a client wrote itself is further left
        (2, "6.6.6.6"),
        (3, "127.0.0.1"),  # one that came past the proxies
    ],
)
def test_addresses_come_from_as_many_proxies_as_are_trusted(trusted_proxies: int, address: str) -> None:
    app = create_app(SiteConfig(security=SecurityConfig(trusted_proxies=trusted_proxies)), ModelRegistry([]))
    found = app.test_client().get("/api/v1/is_reachable/nobody", headers=FORWARDED)
    assert found.json is not None
    assert found.json["your_ip"] == address


@pytest.mark.parametrize(("trusted_proxies", "status"), [(0, 403), (1, 404)])
def test_a_page_behind_a_proxy_is_the_sites_own_if_the_proxy_is_trusted(trusted_proxies: int, status: int) -> None:
    app = create_app(SiteConfig(security=SecurityConfig(trusted_proxies=trusted_proxies)), ModelRegistry([]))
    site_of(app).models.load()
    headers = {**FORWARDED, "Origin": "https://chat.example"}
    assert app.test_client().post("/nothing", headers=headers).status_code == status
