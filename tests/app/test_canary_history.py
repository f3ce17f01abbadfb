"""How test answers went outlives a restart, is forgotten after a month, and harms nothing when it cannot be kept."""

import threading

import pytest

from app.canary_history import CanaryHistory, CanaryRun
from app.config import SiteConfig
from app.database import Database
from app.factory import create_app, site_of
from app.model_registry import ModelRegistry
from app.swarm_history import DAY_S, MONTH_S


def run(at: float, model: str = "m", outcome: str = "ok") -> CanaryRun:
    return CanaryRun(model, at, outcome, 0.5, None, 2)


def test_runs_come_back_in_order_from_a_time_on(database: Database) -> None:
    history = CanaryHistory(database)
    for at in (30.0, 10.0, 20.0):
        history.add(run(at))
    history.add(run(15.0, "other"))
    assert list(history.since("m", 15.0)) == [run(20.0), run(30.0)]
    history.forget("m")
    assert list(history.since("m", 0.0)) == []
    assert list(history.since("other", 0.0)) == [run(15.0, "other")]


def test_runs_outlive_the_site(database_url: str) -> None:
    Database(database_url).upgrade()
    config = SiteConfig(database_url=database_url)
    first = site_of(create_app(config, ModelRegistry([])))
    first.history.add(run(10.0))
    first.database.close()
    second = site_of(create_app(config, ModelRegistry([])))
    assert list(second.history.since("m", 0.0)) == [run(10.0)]
    second.database.close()


def test_what_is_older_than_a_month_is_forgotten(database: Database) -> None:
    history = CanaryHistory(database)
    for at in (0.0, DAY_S, MONTH_S + DAY_S):
        history.add(run(at))
    assert [each.started_at for each in history.since("m", 0.0)] == [DAY_S, MONTH_S + DAY_S]


def test_processes_and_threads_share_them(database: Database, database_url: str) -> None:
    other = Database(database_url)
    first, second = CanaryHistory(database), CanaryHistory(other)

    def add(history: CanaryHistory, begin: int) -> None:
        for number in range(20):
            history.add(run(float(begin + number)))

    threads = [threading.Thread(target=add, args=(history, 100 * n)) for n, history in enumerate([first, second] * 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(first.since("m", 0.0)) == len(second.since("m", 0.0)) == 80
    other.close()


def test_a_database_that_breaks_later_is_logged_only(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    history = CanaryHistory(database)
    history.add(run(10.0))
    with database.writing() as connection:
        connection.exec_driver_sql("DROP TABLE canary_runs")
    history.add(run(20.0))
    assert list(history.since("m", 0.0)) == []
    assert "could not be kept" in caplog.text
    assert "could not be read" in caplog.text
    assert "canary_runs" in caplog.text
