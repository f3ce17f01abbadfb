"""One site under gunicorn for each module that asks for it, and databases of both kinds."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.database import Database
from tests.app.databases import PostgresServer, postgres_server
from tests.app.site_process import SiteProcess, running_site

SITE = {"sockets": {"send_timeout_s": 1.0, "ws_max": 40}}
ABSENT = ("websockets", "open_sessions", "reading_threads", "http_generations", "generating_threads")
PRIVATE_SITE = {"sockets": {"ws_max": 3, "idle_s": 1.0}, "security": {"public_api": False}}


@pytest.fixture(scope="module")
def site() -> Iterator[SiteProcess]:
    """A public site with a fast model."""
    with running_site("--delay", "0.01", settings=SITE) as process:
        yield process


@pytest.fixture(scope="module")
def private_site() -> Iterator[SiteProcess]:
    """A site for its own pages only, with three places, where a session lives for a second."""
    with running_site("--delay", "0.01", settings=PRIVATE_SITE) as process:
        yield process


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test no socket, session, thread or connection is left, and gunicorn's count of them is right."""
    yield
    for name in ("site", "private_site"):
        if name in request.fixturenames:
            found = request.getfixturevalue(name)
            found.wait_for(lambda counts: not any(counts[name] for name in ABSENT))
            found.wait_for(lambda counts: counts["nr_conns"] == 1)  # the one that asks


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server."""
    with postgres_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/site.db"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.new_database()


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A database of each kind with its tables."""
    made = Database(database_url)
    made.upgrade()
    yield made
    made.close()
