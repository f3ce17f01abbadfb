"""The site's database: SQLite in a file, or PostgreSQL by URL, in short transactions. Any thread, several processes.

SQLite's file is made by the first thing that is kept, and its tables are brought up to date by whoever opens it.
PostgreSQL's tables are changed by `umbel-chat database upgrade` alone. While it is away, every use is refused at once,
so that nobody waits for it more than once in `PAUSE_S`.
"""

import contextlib
import logging
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.pool import QueuePool

from app.errors import DatabaseUnavailableError
from app.schema import SchemaState, migrate, schema_state
from app.tables import metadata
from swarm_protocol.errors import ConfigError

logger = logging.getLogger(__name__)

IN_MEMORY = "sqlite://"
"""The URL of a database that lasts as long as the process."""

PAUSE_S = 2.0  # after a failure; a restart of PostgreSQL takes some seconds
BUSY_S = 5.0  # for another process to end its transaction, which takes milliseconds
CONNECT_S = 3  # to reach PostgreSQL; it is next door
POOL_SIZE = 4  # connections that stay open: transactions are short, and most of what is asked is remembered
POSTGRESQL = {"connect_timeout": CONNECT_S, "tcp_user_timeout": 10_000, "prepare_threshold": None}
"""What the URL does not say. A network that swallows packets must not hold threads for minutes; prepared statements are
left out for the sake of poolers such as PgBouncer."""

WRITES = "umbel_writes"

UPGRADE_COMMAND = "umbel-chat database upgrade"


def default_path() -> Path:
    """Return where the database is when no URL says so."""
    return platformdirs.user_data_path("umbel") / "site.db"


def database_url(text: str) -> URL:
    """Return what `UMBEL_DATABASE_URL` says, empty for SQLite in the user's data folder. Raises ConfigError."""
    if not text:
        return URL.create("sqlite", database=str(default_path()))
    try:
        url = make_url(text)
        kind = url.get_backend_name()
    except (ArgumentError, ValueError):  # the text may have a password in it
        raise ConfigError("the database's URL cannot be read; it is sqlite:///FILE or postgresql://…") from None
    if kind in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    if kind == "sqlite":
        path = url.database
        return url.set(drivername="sqlite", database=os.path.expanduser(path) if path else None)
    raise ConfigError(f"the database's URL is of {kind!r}; sqlite and postgresql can be used")


class Database:
    """Opens nothing before the first use."""

    def __init__(self, url: str = "") -> None:
        """Raises ConfigError for a URL of something else, and where PostgreSQL's driver is missing."""
        self._url = database_url(url)
        self._file = Path(self._url.database) if self.is_sqlite and self._url.database else None
        self._lock = threading.Lock()
        self._finding_out = threading.Lock()
        self._is_prepared = False
        self._failed_s: float | None = None
        self._failure = ""
        try:
            self._engine = _engine(self._url)
        except ImportError:
            raise ConfigError("PostgreSQL needs its driver: pip install 'umbel[postgres]'") from None
        # A site is never closed as a whole: its connections are, when nobody has it any more.
        weakref.finalize(self, self._engine.dispose)

    @property
    def is_sqlite(self) -> bool:
        """Whether it is SQLite, in a file or in memory."""
        return self._url.get_backend_name() == "sqlite"

    @property
    def shown_url(self) -> str:
        """Its URL without the password."""
        return self._url.render_as_string(hide_password=True)

    @property
    def exists(self) -> bool:
        """Whether there is anything to read; else nothing was kept yet."""
        return self._file is None or self._file.exists()

    def check(self) -> None:
        """Look whether it can be used, and bring an SQLite file up to date. One that is away is only logged.

        Raises ConfigError, which says what to do.
        """
        if self._file is not None and not self._file.exists():
            _check_folder(self._file)
            return
        try:
            self._prepare()
        except DBAPIError as error:
            if self.is_sqlite:
                raise ConfigError(f"the database {self.shown_url} cannot be used: {error.orig}") from None
            logger.warning("the database is away, and keys with it: %s", _one_line(error))

    def upgrade(self) -> None:
        """Bring the tables up to date. Raises ConfigError."""
        try:
            self._make_file()
            with self._transaction(writes=True) as connection:
                _refuse_newer(schema_state(connection))
                migrate(connection)
        except (OSError, SQLAlchemyError) as error:
            raise ConfigError(f"the database {self.shown_url} cannot be used: {_one_line(error)}") from None

    def state(self) -> SchemaState:
        """Return what its tables are to this program. Raises ConfigError if it cannot be reached."""
        if not self.exists:
            return SchemaState.EMPTY
        try:
            with self._transaction(writes=False) as connection:
                return schema_state(connection)
        except SQLAlchemyError as error:
            raise ConfigError(f"the database {self.shown_url} cannot be used: {_one_line(error)}") from None

    @contextmanager
    def reading(self) -> Iterator[Connection | None]:
        """Read in one transaction; None where nothing was kept yet. Raises DatabaseUnavailableError."""
        if not self.exists:
            yield None
            return
        with self._using(writes=False) as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Change something in one transaction, which is undone by an exception. Raises DatabaseUnavailableError.

        An IntegrityError is the caller's.
        """
        with self._using(writes=True) as connection:
            yield connection

    def close(self) -> None:
        """Close its connections; the next use opens others."""
        self._engine.dispose()

    @contextmanager
    def _using(self, *, writes: bool) -> Iterator[Connection]:
        failed_s = self._failed_s
        if failed_s is None:
            with self._trying(writes=writes) as connection:
                yield connection
            return
        # Who comes first when the pause is over finds out for all others, who are not to wait for what may hang.
        if time.monotonic() - failed_s < PAUSE_S or not self._finding_out.acquire(blocking=False):
            raise DatabaseUnavailableError
        try:
            with self._trying(writes=writes) as connection:
                yield connection
        finally:
            self._finding_out.release()
        logger.info("the database answers again")
        self._failure, self._failed_s = "", None

    @contextmanager
    def _trying(self, *, writes: bool) -> Iterator[Connection]:
        try:
            if writes:
                self._make_file()
            self._prepare()
            with self._transaction(writes=writes) as connection:
                yield connection
        except IntegrityError:
            raise
        except (OSError, SQLAlchemyError, ConfigError) as error:
            self._fail(error)
            raise DatabaseUnavailableError from None

    def _fail(self, error: Exception) -> None:
        said = _one_line(error)
        if said != self._failure:
            logger.error("the database cannot be used: %s", said)
        self._failure, self._failed_s = said, time.monotonic()

    @contextmanager
    def _transaction(self, *, writes: bool) -> Iterator[Connection]:
        with self._engine.connect() as connection:
            connection = connection.execution_options(**{WRITES: writes})
            with connection.begin():
                yield connection

    def _make_file(self) -> None:
        """Make SQLite's file where it is missing. It has addresses in it, so it is for its owner alone."""
        if self._file is None or self._file.exists():
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(self._file, os.O_CREAT | os.O_RDWR, 0o600))
        logger.info("made the database %s", self._file)

    def _prepare(self) -> None:
        """Have the tables be this program's, once. Raises ConfigError for PostgreSQL's where they are not."""
        with self._lock:
            if self._is_prepared:
                return
            if self.is_sqlite and self._file is None:
                with self._transaction(writes=True) as connection:
                    metadata.create_all(connection)
            else:
                with self._transaction(writes=False) as connection:
                    state = schema_state(connection)
                _refuse_newer(state)
                if state is not SchemaState.CURRENT:
                    self._upgrade_by_itself(state)
            self._is_prepared = True

    def _upgrade_by_itself(self, state: SchemaState) -> None:
        if not self.is_sqlite:
            what = "has no tables yet" if state is SchemaState.EMPTY else "is of an older version"
            raise ConfigError(f"the database {self.shown_url} {what}: run `{UPGRADE_COMMAND}`")
        with self._transaction(writes=True) as connection:
            migrate(connection)


def _refuse_newer(state: SchemaState) -> None:
    if state is SchemaState.NEWER:
        raise ConfigError("the database was made by a newer version of this program: install that one")


def site_database(url: str) -> Database:
    """Return the database of a site. Where nobody chose a place and the usual one cannot be written to, as in some
    containers, it lasts as long as the process. Raises ConfigError as `Database`."""
    if not url and not default_path().exists():
        try:
            _check_folder(default_path())
        except ConfigError as error:
            logger.warning("what should be kept lasts as long as this process: %s", error)
            return Database(IN_MEMORY)
    return Database(url)


def _check_folder(file: Path) -> None:
    """Raise ConfigError where a file could not be made; makes nothing."""
    folder = next(parent for parent in file.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"the database {file} cannot be made: {folder} is no folder that can be written to")


def _one_line(error: Exception) -> str:
    return " ".join(str(getattr(error, "orig", None) or error).split())


def _engine(url: URL) -> Engine:
    """Return an engine, which connects when it is used. Values of statements are never in its errors."""
    if url.get_backend_name() == "postgresql":
        engine = create_engine(
            url,
            hide_parameters=True,
            pool_pre_ping=True,
            pool_size=POOL_SIZE,
            pool_timeout=BUSY_S,
            connect_args={name: value for name, value in POSTGRESQL.items() if name not in url.query},
        )
        event.listen(engine, "begin", _begin_postgresql)
        return engine
    in_memory = {"pool_size": 1, "max_overflow": 0} if not url.database else {"pool_size": POOL_SIZE}
    engine = create_engine(
        url,
        hide_parameters=True,
        poolclass=QueuePool,  # in memory there is one connection, and threads take turns
        pool_timeout=BUSY_S,
        connect_args={"check_same_thread": False, "timeout": BUSY_S},
        **in_memory,
    )
    event.listen(engine, "connect", _connected_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _connected_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # Python's driver would begin transactions by itself, and too late
    # It lasts in the file. Where several open a new one at once, all but one are refused, and need it not.
    with contextlib.suppress(sqlite3.OperationalError):
        connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _begin_sqlite(connection: Connection) -> None:
    # One that writes takes its turn at the beginning: a reader that becomes a writer may fail at once.
    writes = connection.get_execution_options().get(WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _begin_postgresql(connection: Connection) -> None:
    connection.exec_driver_sql(f"SET LOCAL statement_timeout = {int(BUSY_S * 1000)}")
