"""What is used by each key, and by each address without one, held against its limits."""

import ipaddress
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from app.config import AddressLimits
from app.limit_store import Counts, MemoryCounts, new_lease, until_tomorrow_s
from swarm_protocol.errors import LimitExceededError

IPV6_PREFIX = 64  # what one household or server has


class QuotaError(LimitExceededError):
    """A key or an address has used up what it may use; `retry_after_s` says when that ends."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = math.ceil(retry_after_s)


@dataclass(frozen=True, slots=True)
class Quota:
    """What a key or address may use; None is no limit. `who` is how those who hold it, or read through it, are told."""

    key_id: str
    requests_per_minute: int | None = None
    tokens_per_day: int | None = None
    sessions: int | None = None
    who: str = "this key"


@dataclass(frozen=True, slots=True)
class Standing:
    """What is left of one limit, and in how many seconds it is whole again."""

    limit: int
    left: int
    reset_s: float


def counted_address(address: str) -> str:
    """Return what an address counts as: IPv6 by its network, which its holder may move about in."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if isinstance(found, ipaddress.IPv6Address):
        mapped = found.ipv4_mapped
        return str(mapped or ipaddress.ip_network((found, IPV6_PREFIX), strict=False))
    return str(found)


def address_quota(address: str, limits: AddressLimits) -> Quota | None:
    """Return what somebody without a key may use; None for anything."""
    allowed = (limits.address_requests_per_minute, limits.address_tokens_per_day, limits.address_sessions)
    if not any(allowed):
        return None
    requests, tokens, sessions = (limit or None for limit in allowed)
    return Quota(f"address:{counted_address(address)}", requests, tokens, sessions, who="your address")


class KeyUsage:
    """Counts questions, tokens and sessions by quota. Any thread."""

    def __init__(self, counts: Counts | None = None) -> None:
        """`counts` None counts in this process, for as long as it lives."""
        self._counts = counts or MemoryCounts()
        self._lock = threading.Lock()
        self._held: dict[str, Quota] = {}

    def ask(self, quota: Quota) -> None:
        """Count a question. Raises QuotaError where none is allowed now."""
        if quota.tokens_per_day is not None and self._counts.tokens(quota.key_id) >= quota.tokens_per_day:
            raise QuotaError(
                f"{quota.who} has used up its {quota.tokens_per_day} tokens of today; come back tomorrow",
                until_tomorrow_s(time.time()),
            )
        if quota.requests_per_minute is None:
            return
        wait_s = self._counts.take_request(quota.key_id, quota.requests_per_minute)
        if wait_s is not None:
            raise QuotaError(
                f"{quota.who} may send {quota.requests_per_minute} requests a minute; try again soon", wait_s
            )

    def left(self, quota: Quota) -> int | None:
        """Return how many tokens may be answered today; None for any number."""
        if quota.tokens_per_day is None:
            return None
        return max(0, quota.tokens_per_day - self._counts.tokens(quota.key_id))

    def count_tokens(self, quota: Quota, num_tokens: int) -> None:
        """Count tokens of an answer, complete or not."""
        if quota.tokens_per_day is not None:
            self._counts.add_tokens(quota.key_id, num_tokens)

    @contextmanager
    def session(self, quota: Quota | None) -> Iterator[None]:
        """Count one more session inside; None is nobody's. Raises QuotaError for one too many."""
        if quota is None or quota.sessions is None:
            yield
            return
        lease = new_lease()
        if not self._counts.take_lease(quota.key_id, quota.sessions, lease):
            raise QuotaError(f"{quota.who} has {quota.sessions} sessions at once; end one of them", 1.0)
        with self._lock:
            self._held[lease] = quota
        try:
            yield
        finally:
            with self._lock:
                del self._held[lease]
            self._counts.end_lease(quota.key_id, lease)

    def renew(self) -> None:
        """Say that the sessions which are held are alive; more often than their leases last."""
        with self._lock:
            held = list(self._held.items())
        for lease, quota in held:
            if quota.sessions is not None:
                self._counts.take_lease(quota.key_id, quota.sessions, lease)
                with self._lock:
                    has_ended = lease not in self._held
                if has_ended:  # meanwhile
                    self._counts.end_lease(quota.key_id, lease)

    def requests(self, quota: Quota) -> Standing | None:
        """Return what is left of a minute's requests; None without a limit."""
        if quota.requests_per_minute is None:
            return None
        left, reset_s = self._counts.requests_left(quota.key_id, quota.requests_per_minute)
        return Standing(quota.requests_per_minute, left, reset_s)

    def tokens(self, quota: Quota) -> Standing | None:
        """Return what is left of a day's tokens; None without a limit."""
        left = self.left(quota)
        if quota.tokens_per_day is None or left is None:
            return None
        return Standing(quota.tokens_per_day, left, until_tomorrow_s(time.time()))


def standing_headers(requests: Standing | None, tokens: Standing | None) -> dict[str, str]:
    """Pure: return the headers by which clients of OpenAI's API see their limits."""
    headers: dict[str, str] = {}
    for name, standing in (("requests", requests), ("tokens", tokens)):
        if standing is not None:
            headers[f"x-ratelimit-limit-{name}"] = str(standing.limit)
            headers[f"x-ratelimit-remaining-{name}"] = str(standing.left)
            headers[f"x-ratelimit-reset-{name}"] = f"{math.ceil(standing.reset_s)}s"
    return headers
