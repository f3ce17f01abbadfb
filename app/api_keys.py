"""API keys: who may use the APIs, and how much. Of a key only a hash is kept; the secret is shown once.

A secret is `uk_`, twelve hex digits and 256 random bits. The part before the second underscore is its id, by which the
operator, the log and the usage name it. SHA-256 is enough for what nobody can guess; slow hashes are for passwords.
"""

import hashlib
import re
import secrets
import time
from dataclasses import asdict, dataclass

from sqlalchemy import Row, insert, select, update

from app.database import Database
from app.fresh import Fresh
from app.key_usage import Quota
from app.tables import api_keys
from swarm_protocol.errors import ConfigError

SECRET = re.compile(r"uk_[0-9a-f]{12}_[A-Za-z0-9_-]{43}")
PREFIX = "uk_"
MAX_NAME_CHARS = 200


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What one key allows; None is no limit, and never. Times are in seconds since 1970."""

    id: str
    name: str
    requests_per_minute: int | None
    tokens_per_day: int | None
    sessions: int | None
    """Websockets and answers at once."""
    created_at: float
    expires_at: float | None
    revoked_at: float | None

    @property
    def quota(self) -> Quota:
        """What may be used with it."""
        return Quota(self.id, self.requests_per_minute, self.tokens_per_day, self.sessions)

    def is_usable(self, now: float) -> bool:
        """Return whether it was neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What a new key allows. `expires_s` is from now on."""

    requests_per_minute: int | None = None
    tokens_per_day: int | None = None
    sessions: int | None = None
    expires_s: float | None = None


_COLUMNS = [api_keys.c[name] for name in ApiKey.__slots__]


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _key_of(row: Row[*tuple[object, ...]] | None) -> ApiKey | None:
    return None if row is None else ApiKey(**row._asdict())


class ApiKeys:
    """The keys of a site. Any thread, several processes."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._found: Fresh[str, ApiKey | None] = Fresh(self._read)

    def _read(self, secret_hash: str) -> ApiKey | None:
        with self._database.reading() as connection:
            if connection is None:
                return None
            query = select(*_COLUMNS).where(api_keys.c.secret_hash == secret_hash)
            return _key_of(connection.execute(query).one_or_none())

    def find(self, secret: str) -> ApiKey | None:
        """Return the key of a secret, which may be revoked or expired. Raises DatabaseUnavailableError."""
        return self._found.get(_hash(secret)) if SECRET.fullmatch(secret) else None

    def list(self) -> tuple[ApiKey, ...]:
        """Return all keys, the oldest first. Raises DatabaseUnavailableError."""
        with self._database.reading() as connection:
            if connection is None:
                return ()
            rows = connection.execute(select(*_COLUMNS).order_by(api_keys.c.created_at, api_keys.c.id))
            return tuple(ApiKey(**row._asdict()) for row in rows)

    def create(self, name: str, limits: KeyLimits) -> tuple[ApiKey, str]:
        """Make a key; return it and its secret, which nothing can tell again.

        Raises ConfigError for what no key can have, and DatabaseUnavailableError.
        """
        for limit in (limits.requests_per_minute, limits.tokens_per_day, limits.sessions):
            if limit is not None and limit < 1:
                raise ConfigError(f"limit {limit} of {name[:40]!r} is below 1; leave it out for none")
        if not 0 < len(name) <= MAX_NAME_CHARS:
            raise ConfigError(f"a name has 1 to {MAX_NAME_CHARS} characters, this one {len(name)}")
        key_id, now = PREFIX + secrets.token_hex(6), time.time()
        secret = f"{key_id}_{secrets.token_urlsafe(32)}"
        expires_at = None if limits.expires_s is None else now + limits.expires_s
        key = ApiKey(
            key_id, name, limits.requests_per_minute, limits.tokens_per_day, limits.sessions, now, expires_at, None
        )
        with self._database.writing() as connection:
            connection.execute(insert(api_keys), {**asdict(key), "secret_hash": _hash(secret)})
        self._found.forget()
        return key, secret

    def revoke(self, key_id: str) -> bool:
        """Let a key be used no more; return whether there was one in use. Raises DatabaseUnavailableError."""
        wanted = (api_keys.c.id == key_id) & api_keys.c.revoked_at.is_(None)
        with self._database.writing() as connection:
            changed = connection.execute(update(api_keys).where(wanted).values(revoked_at=time.time()))
        self._found.forget()
        return changed.rowcount > 0
