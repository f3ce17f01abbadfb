"""Who may not use the site: banned addresses, networks and keys, and keys that were revoked while they are in use.

A process reads the list every `REFRESH_S` in the background (`app/keeper.py`) and asks nobody in between, so that each
frame of each socket can be held against it. While the database is away the last list holds.
"""

import logging
import threading
import time
from dataclasses import asdict

from sqlalchemy import ColumnElement, Connection, delete, insert, or_, select

from app.ban_rules import Ban, BanList, ban_list, ban_target
from app.caller import Caller
from app.database import Database
from app.errors import BannedError, DatabaseUnavailableError, InvalidKeyError
from app.tables import api_keys, bans

logger = logging.getLogger(__name__)

REFRESH_S = 2.0  # a ban holds everywhere within 5 s
STALE_S = 3.0  # where nobody reads it in the background, as in a command, whoever asks does
REVOKED_S = 2 * 86_400.0  # keys that were revoked before this have no socket any more
MAX_REASON_CHARS = 500

_COLUMNS = [bans.c[name] for name in Ban.__slots__]


def _holds(now: float) -> ColumnElement[bool]:
    return or_(bans.c.expires_at.is_(None), bans.c.expires_at > now)


class Bans:
    """The bans of a site. Any thread, several processes."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._reading = threading.Lock()
        self._read_s: float | None = None
        self._is_kept = False
        self._list = BanList()
        self._revoked: frozenset[str] = frozenset()

    def leave_to_keeper(self) -> None:
        """Read the list now, and let no request read it from then on: a database that hangs holds nobody up."""
        self.refresh()
        self._is_kept = True

    def refresh(self) -> None:
        """Read the list anew; keeps the last one where that fails."""
        now = time.time()
        try:
            with self._database.reading() as connection:
                found, revoked = ([], []) if connection is None else _read(connection, now)
            self._list, self._revoked = ban_list(found), frozenset(revoked)
        except DatabaseUnavailableError:
            logger.debug("the list of bans stays as it was")
        self._read_s = time.monotonic()

    def check(self, caller: Caller) -> None:
        """Raise BannedError for somebody who is banned, and InvalidKeyError for a key that is in use no more.

        Waits for nobody, where a keeper reads the list.
        """
        read_s = self._read_s
        is_stale = not self._is_kept and (read_s is None or time.monotonic() - read_s > STALE_S)
        if is_stale and self._reading.acquire(blocking=read_s is None):
            try:
                if self._read_s is read_s:
                    self.refresh()
            finally:
                self._reading.release()
        key = caller.api_key
        if self._list.meets(caller.address, (None if key is None else key.id, caller.widget_key)):
            raise BannedError
        if key is not None and (key.id in self._revoked or not key.is_usable(time.time())):
            raise InvalidKeyError

    def add(self, target: str, reason: str, expires_s: float | None) -> Ban:
        """Ban an address, a network or a key, in place of an earlier ban of the same.

        Raises ConfigError for what cannot be banned, and DatabaseUnavailableError.
        """
        now = time.time()
        expires_at = None if expires_s is None else now + expires_s
        ban = Ban(ban_target(target), reason[:MAX_REASON_CHARS], now, expires_at)
        with self._database.writing() as connection:
            connection.execute(delete(bans).where(bans.c.target == ban.target))
            connection.execute(insert(bans), asdict(ban))
        self._read_s = None
        return ban

    def remove(self, target: str) -> bool:
        """Lift a ban; return whether there was one. Raises ConfigError and DatabaseUnavailableError."""
        with self._database.writing() as connection:
            changed = connection.execute(delete(bans).where(bans.c.target == ban_target(target)))
        self._read_s = None
        return changed.rowcount > 0

    def list(self) -> tuple[Ban, ...]:
        """Return the bans that hold, the oldest first. Raises DatabaseUnavailableError."""
        with self._database.reading() as connection:
            if connection is None:
                return ()
            query = select(*_COLUMNS).where(_holds(time.time())).order_by(bans.c.created_at, bans.c.target)
            return tuple(Ban(*row) for row in connection.execute(query))


def _read(connection: Connection, now: float) -> tuple[list[str], list[str]]:
    found = connection.scalars(select(bans.c.target).where(_holds(now))).all()
    revoked = connection.scalars(select(api_keys.c.id).where(api_keys.c.revoked_at > now - REVOKED_S)).all()
    return list(found), list(revoked)
