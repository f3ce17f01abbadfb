"""Where requests, tokens and sessions are counted: in this process, or in Redis for all processes of a site.

Counting is the library `limits`'. What it has no word for are sessions that end when their process dies: those are
leases, kept alive by whoever holds one. While Redis is away everything is counted here, so that a site whose Redis
restarts goes on; each process then counts for itself.
"""

import logging
import math
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from limits import RateLimitItemPerDay, RateLimitItemPerMinute
from limits.storage import MemoryStorage, RedisStorage, Storage
from limits.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter

from swarm_protocol.errors import ConfigError

logger = logging.getLogger(__name__)

T = TypeVar("T")

MINUTE_S, DAY_S = 60.0, 86_400
LEASE_S = 120.0
"""After which a session of a process that died is free again; an answer that runs renews its own."""

REDIS_TIMEOUT_S = 1.0  # it is next door
PAUSE_S = 5.0  # until Redis is asked again after it failed, so that nobody waits for it twice
SAY_AGAIN_S = 60.0

_UNBOUNDED = 1 << 60
"""Tokens are counted after the fact, so the library's own bound is none."""

_TAKE_LEASE = """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[1])
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[3]) then return 0 end
redis.call('ZADD', KEYS[1], ARGV[2], ARGV[4])
redis.call('PEXPIRE', KEYS[1], ARGV[5])
return 1
"""
"""In one step, so that two processes do not both take the last place."""


class Counts(Protocol):
    """What is counted, by account: any text."""

    def take_request(self, account: str, per_minute: int) -> float | None:
        """Count a request; if it is one too many, return in how many seconds the next may come instead."""
        ...

    def requests_left(self, account: str, per_minute: int) -> tuple[int, float]:
        """Return how many requests may come now, and in how many seconds all of them may again."""
        ...

    def tokens(self, account: str) -> int:
        """Return the tokens of today, by UTC."""
        ...

    def add_tokens(self, account: str, num_tokens: int) -> None:
        """Count tokens."""
        ...

    def take_lease(self, account: str, most: int, lease: str) -> bool:
        """Hold a session under the name `lease` for `LEASE_S`, or again; False if `most` others are held."""
        ...

    def end_lease(self, account: str, lease: str) -> None:
        """Hold it no longer. Idempotent."""
        ...


def until_tomorrow_s(now_s: float) -> float:
    """Return the seconds until the day ends, by UTC."""
    return DAY_S - now_s % DAY_S


class _Library:
    """Requests and tokens, by the library, in any of its storages."""

    def __init__(self, storage: Storage) -> None:
        self._requests = MovingWindowRateLimiter(storage)
        self._tokens = FixedWindowRateLimiter(storage)
        self._day = RateLimitItemPerDay(_UNBOUNDED)

    def take_request(self, account: str, per_minute: int) -> float | None:
        item = RateLimitItemPerMinute(per_minute)
        if self._requests.hit(item, account):
            return None
        return max(1.0, self._requests.get_window_stats(item, account).reset_time - time.time())

    def requests_left(self, account: str, per_minute: int) -> tuple[int, float]:
        stats = self._requests.get_window_stats(RateLimitItemPerMinute(per_minute), account)
        is_used = stats.remaining < per_minute
        return max(0, stats.remaining), max(0.0, stats.reset_time - time.time()) if is_used else 0.0

    def tokens(self, account: str) -> int:
        return _UNBOUNDED - self._tokens.get_window_stats(self._day, *self._today(account)).remaining

    def add_tokens(self, account: str, num_tokens: int) -> None:
        if num_tokens > 0:
            self._tokens.hit(self._day, *self._today(account), cost=num_tokens)

    @staticmethod
    def _today(account: str) -> tuple[str, str]:
        # The library's day begins with the first token; people's begins at midnight.
        return account, str(math.floor(time.time() / DAY_S))


class MemoryCounts(_Library):
    """Counts of this process. Any thread."""

    def __init__(self) -> None:
        super().__init__(MemoryStorage())
        self._lock = threading.Lock()
        self._leases: dict[str, dict[str, float]] = {}

    def take_lease(self, account: str, most: int, lease: str) -> bool:
        """See `Counts`. In a process that lives nobody has to renew a lease."""
        with self._lock:
            held = self._leases.setdefault(account, {})
            if lease not in held and len(held) >= most:
                return False
            held[lease] = 0.0
            return True

    def end_lease(self, account: str, lease: str) -> None:
        """See `Counts`."""
        with self._lock:
            held = self._leases.get(account, {})
            held.pop(lease, None)
            if not held:
                self._leases.pop(account, None)


class RedisCounts(_Library):
    """Counts that all processes share. Any thread; raises what the library's Redis client raises."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError for a URL of something else, and where Redis' client is missing."""
        if not url.startswith(("redis://", "rediss://", "redis+unix://", "unix://")):
            raise ConfigError("the limits' URL is redis://HOST:PORT/DB, rediss://… or redis+unix:///SOCKET?db=…")
        url = f"redis+{url}" if url.startswith("unix://") else url
        options: dict[str, Any] = {"socket_timeout": REDIS_TIMEOUT_S, "socket_connect_timeout": REDIS_TIMEOUT_S}
        if url.startswith("redis+unix://"):
            options = {"socket_timeout": REDIS_TIMEOUT_S}
        try:
            storage = RedisStorage(url, key_prefix="umbel", **options)
        except Exception as error:  # the library's for a client that is missing, the client's for a bad URL
            raise ConfigError(f"the limits' URL cannot be used: {error}") from None
        super().__init__(storage)
        self.errors: tuple[type[Exception], ...] = _as_tuple(storage.base_exceptions)
        self._redis = storage.storage
        self._take = self._redis.register_script(_TAKE_LEASE)

    def take_lease(self, account: str, most: int, lease: str) -> bool:
        """See `Counts`."""
        key, now_s = f"umbel:sessions:{account}", time.time()
        if self._redis.zscore(key, lease) is not None:
            most += 1  # its own place
        arguments = [now_s, now_s + LEASE_S, most, lease, int(2000 * LEASE_S)]
        return bool(self._take(keys=[key], args=arguments))

    def end_lease(self, account: str, lease: str) -> None:
        """See `Counts`."""
        self._redis.zrem(f"umbel:sessions:{account}", lease)

    def problem(self) -> str:
        """Return why Redis cannot be used now; empty if it can."""
        try:
            self._redis.ping()
        except self.errors as error:
            return str(error)
        return ""


class SharedCounts:
    """Those of Redis, and while it is away those of this process. Any thread; raises nothing."""

    def __init__(self, redis: RedisCounts, clock: Callable[[], float] = time.monotonic) -> None:
        self._redis, self._own, self._clock = redis, MemoryCounts(), clock
        self._away_until_s = self._said_s = -math.inf

    @property
    def is_away(self) -> bool:
        """Whether Redis failed a moment ago."""
        return self._clock() < self._away_until_s

    def take_request(self, account: str, per_minute: int) -> float | None:
        """See `Counts`."""
        return self._on_either(lambda counts: counts.take_request(account, per_minute))

    def requests_left(self, account: str, per_minute: int) -> tuple[int, float]:
        """See `Counts`."""
        return self._on_either(lambda counts: counts.requests_left(account, per_minute))

    def tokens(self, account: str) -> int:
        """See `Counts`."""
        return self._on_either(lambda counts: counts.tokens(account))

    def add_tokens(self, account: str, num_tokens: int) -> None:
        """See `Counts`."""
        self._on_either(lambda counts: counts.add_tokens(account, num_tokens))

    def take_lease(self, account: str, most: int, lease: str) -> bool:
        """See `Counts`."""
        return self._on_either(lambda counts: counts.take_lease(account, most, lease))

    def end_lease(self, account: str, lease: str) -> None:
        """See `Counts`. It may have been taken where counting is not done any more."""
        self._own.end_lease(account, lease)
        self._on_either(lambda counts: counts.end_lease(account, lease))

    def _on_either(self, use: Callable[[Counts], T]) -> T:
        if not self.is_away:
            try:
                return use(self._redis)
            except self._redis.errors as error:
                now_s = self._clock()
                self._away_until_s = now_s + PAUSE_S
                if now_s - self._said_s >= SAY_AGAIN_S:
                    self._said_s = now_s
                    logger.warning("Redis is away, limits are counted by this process alone: %s", error)
        return use(self._own)


def counts_of(url: str) -> Counts:
    """Return what counts: this process for an empty `url`, else Redis. Raises ConfigError."""
    return SharedCounts(RedisCounts(url)) if url else MemoryCounts()


def new_lease() -> str:
    """Return a name for a lease that no other has."""
    return secrets.token_hex(8)


def _as_tuple(errors: type[Exception] | tuple[type[Exception], ...]) -> tuple[type[Exception], ...]:
    return errors if isinstance(errors, tuple) else (errors,)
