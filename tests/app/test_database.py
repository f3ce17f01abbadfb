"""The database of a site: what it is made by, how its tables come up to date, and what happens while it is away."""

import logging
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import insert, select

from app.cli import main
from app.config import SiteConfig
from app.database import IN_MEMORY, Database, default_path, site_database
from app.errors import DatabaseUnavailableError
from app.factory import create_app
from app.fresh import Fresh
from app.model_registry import ModelRegistry
from app.schema import SchemaState, migrate, revision_of, revisions, schema_state
from app.tables import canary_runs, metadata
from swarm_protocol.errors import ConfigError
from tests.app.databases import PostgresServer
from tests.app.site_process import ROOT

RUN = {"model": "m", "started_at": 1.0, "outcome": "ok", "min_replicas": 1}


def differences(database: Database) -> list[object]:
    with database.writing() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        return list(compare_metadata(context, metadata))


def num_runs(database: Database) -> int:
    with database.reading() as connection:
        return 0 if connection is None else len(connection.execute(select(canary_runs)).all())


# migrations


def test_migrations_make_the_tables_that_the_program_uses(database: Database) -> None:
    assert differences(database) == []


@pytest.mark.parametrize("revision", revisions())
def test_a_database_of_any_version_comes_up_to_date_and_back(database_url: str, revision: str) -> None:
    database = Database(database_url)
    database.upgrade()
    with database.writing() as connection:
        migrate(connection, revision)
        assert revision_of(connection) == revision
    is_last = revision == revisions()[-1]
    assert database.state() is (SchemaState.CURRENT if is_last else SchemaState.BEHIND)
    other = Database(database_url)
    other.upgrade()
    assert other.state() is SchemaState.CURRENT
    assert differences(other) == []
    with other.writing() as connection:
        migrate(connection, "base")
        assert schema_state(connection) is SchemaState.EMPTY
    for each in (database, other):
        each.close()


def test_processes_that_upgrade_at_the_same_time_wait_for_each_other(database_url: str) -> None:
    databases = [Database(database_url) for _ in range(4)]
    failures: list[Exception] = []

    def upgrade(database: Database) -> None:
        try:
            database.upgrade()
        except ConfigError as error:
            failures.append(error)

    threads = [threading.Thread(target=upgrade, args=(database,)) for database in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert differences(databases[0]) == []
    for database in databases:
        database.close()


def test_a_migration_that_fails_leaves_the_tables_as_they_were(database_url: str) -> None:
    database = Database(database_url)
    with database._transaction(writes=True) if database.is_sqlite else database._engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE widget_keys (key TEXT)")
    with pytest.raises(ConfigError, match="widget_keys"):
        database.upgrade()
    assert database.state() is SchemaState.EMPTY
    database.close()


def test_an_old_file_is_brought_up_to_date_by_whoever_opens_it(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/site.db"
    old = Database(url)
    old.upgrade()
    with old.writing() as connection:
        migrate(connection, revisions()[0])
    old.close()
    new = Database(url)
    new.check()
    assert new.state() is SchemaState.CURRENT
    new.close()


def test_postgresql_is_upgraded_by_its_command_alone(postgres: PostgresServer, capsys: pytest.CaptureFixture[str],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    url = postgres.new_database()
    database = Database(url)
    with pytest.raises(ConfigError, match="no tables yet: run `umbel-chat database upgrade`"):
        database.check()
    monkeypatch.setenv("UMBEL_DATABASE_URL", url)
    assert main(["serve", "--model", "m"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(DatabaseUnavailableError), database.reading():
        pass
    assert main(["database", "status"]) == 1
    assert main(["database", "upgrade"]) == 0
    assert "up to date" in capsys.readouterr().out
    database.check()
    upgraded = Database(url)
    with upgraded.writing() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    newer = Database(url)
    with pytest.raises(ConfigError, match="newer version"):
        newer.check()
    assert main(["database", "upgrade"]) == 2
    for each in (database, upgraded, newer):
        each.close()


# where it is


def test_a_site_that_keeps_nothing_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert default_path() == tmp_path / "data" / "umbel" / "site.db"
    site_database("").check()
    client = create_app(SiteConfig(), ModelRegistry([])).test_client()
    assert client.get("/swarm").status_code == 200
    assert client.get("/embed/wk_nobody").status_code < 500
    assert main(["widget", "list"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert main(["widget", "create", "--name", "shop", "--origin", "https://shop.example"]) == 0
    assert stat.S_IMODE(default_path().stat().st_mode) == 0o600


def test_urls_of_other_things_are_refused_without_their_passwords(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("this is no database, and long enough to be seen as none")
    for url in ("mysql://u:secret@h/d", "secret", "postgresql://u:secret@h:port/d", "://"):
        with pytest.raises(ConfigError) as found:
            Database(url)
        assert "secret" not in str(found.value)
    for name in ("text", "text/below"):
        with pytest.raises(ConfigError, match="cannot be"):
            Database(f"sqlite:///{tmp_path}/{name}").check()
    assert Database("postgres://u:secret@h/d").shown_url == "postgresql+psycopg://u:***@h/d"


def test_where_the_usual_place_is_no_folder_memory_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    database = site_database("")
    with database.writing() as connection:
        connection.execute(insert(canary_runs), RUN)
    assert num_runs(database) == 1
    database.close()


# using it


def test_what_fails_in_the_middle_is_undone(database: Database) -> None:
    def keep_and_fail() -> None:
        with database.writing() as connection:
            connection.execute(insert(canary_runs), RUN)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        keep_and_fail()
    assert num_runs(database) == 0


def test_threads_take_turns_in_memory() -> None:
    database = Database(IN_MEMORY)

    def add() -> None:
        for _ in range(20):
            with database.writing() as connection:
                connection.execute(insert(canary_runs), RUN)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert num_runs(database) == 80
    database.close()


def test_a_file_that_is_written_to_for_long_is_read_all_the_same(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/site.db")
    database.upgrade()
    writer = sqlite3.connect(tmp_path / "site.db", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    assert num_runs(database) == 0
    writer.execute("COMMIT")
    writer.close()
    database.close()


def test_a_server_that_restarts_is_used_again(caplog: pytest.LogCaptureFixture, postgres: PostgresServer) -> None:
    caplog.set_level(logging.INFO, "app")
    database = Database(postgres.new_database())
    database.upgrade()
    assert num_runs(database) == 0
    postgres.stop()
    try:
        with pytest.raises(DatabaseUnavailableError):
            num_runs(database)
        began_s = time.monotonic()
        for _ in range(1000):  # nobody waits for it, and the log has one line
            with pytest.raises(DatabaseUnavailableError):
                num_runs(database)
            if time.monotonic() - began_s > 1:
                break
        Database(postgres.new_url()).check()
    finally:
        postgres.start()
    deadline_s = time.monotonic() + 60
    while True:
        try:
            assert num_runs(database) == 0
            break
        except DatabaseUnavailableError:
            assert time.monotonic() < deadline_s
            time.sleep(0.2)
    assert 1 <= caplog.text.count("the database cannot be used") <= 3  # it may say that it is starting, too
    assert caplog.text.count("the database answers again") == 1
    assert "the database is away" in caplog.text
    database.close()


# the start


def test_gunicorn_ends_with_one_line_where_the_settings_are_no_use(tmp_path: Path, postgres: PostgresServer) -> None:
    (tmp_path / "text").write_text("this is no database, and long enough to be seen as none")
    cases = {
        f"sqlite:///{tmp_path}/text": "file is not a database",
        postgres.new_database(): "run `umbel-chat database upgrade`",
    }
    for url, said in cases.items():
        environment = {**os.environ, "UMBEL_DATABASE_URL": url, "UMBEL_MODELS": "m", "PORT": "0"}
        done = subprocess.run(
            [sys.executable, "-m", "gunicorn", "-c", "gunicorn.conf.py", "app:create_app()"],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert said in done.stderr


# what was read a moment ago


def test_what_was_read_is_read_again_after_a_while_and_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked = [100.0], []
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def read(key: str) -> int:
        asked.append(key)
        return len(asked)

    found = Fresh(read, fresh_s=3.0, max_kept=2)
    assert [found.get("a"), found.get("a")] == [1, 1]
    clock[0] += 2.9
    assert found.get("a") == 1
    clock[0] += 0.1
    assert found.get("a") == 2
    found.forget()
    assert found.get("a") == 3
    for key in "bcdefg":
        found.get(key)
    assert len(found._kept) <= 2


def test_a_value_that_was_read_before_a_change_is_not_kept() -> None:
    asked: list[str] = []

    def read(key: str) -> int:
        asked.append(key)
        if len(asked) == 1:
            found.forget()  # as another thread would, that changed it meanwhile
        return len(asked)

    found = Fresh(read)
    assert [found.get("a"), found.get("a"), found.get("a")] == [1, 2, 2]
