"""How test answers went outlives a restart, is forgotten after a month, and harms nothing when it cannot be kept."""

import sqlite3
import threading
from pathlib import Path

import pytest

from app.canary_history import CanaryHistory, CanaryRun
from app.config import SiteConfig, StatusConfig
from app.factory import create_app, site_of
from app.model_registry import ModelRegistry
from app.swarm_history import DAY_S, MONTH_S
from swarm_protocol.errors import ConfigError


def run(at: float, model: str = "m", outcome: str = "ok") -> CanaryRun:
    return CanaryRun(model, at, outcome, 0.5, None, 2)


@pytest.mark.parametrize("name", ["", "folder/history.db"])
def test_runs_come_back_in_order_from_a_time_on(tmp_path: Path, name: str) -> None:
    history = CanaryHistory(str(tmp_path / name) if name else "")
    for at in (30.0, 10.0, 20.0):
        history.add(run(at))
    history.add(run(15.0, "other"))
    assert list(history.since("m", 15.0)) == [run(20.0), run(30.0)]
    history.forget("m")
    assert list(history.since("m", 0.0)) == []
    assert list(history.since("other", 0.0)) == [run(15.0, "other")]
    history.close()


def test_a_file_outlives_the_site(tmp_path: Path) -> None:
    config = SiteConfig(status=StatusConfig(history_file=str(tmp_path / "history.db")))
    first = site_of(create_app(config, ModelRegistry([])))
    first.history.add(run(10.0))
    first.history.close()
    second = site_of(create_app(config, ModelRegistry([])))
    assert list(second.history.since("m", 0.0)) == [run(10.0)]
    second.history.close()


def test_what_is_older_than_a_month_is_forgotten(tmp_path: Path) -> None:
    history = CanaryHistory(str(tmp_path / "history.db"))
    for at in (0.0, DAY_S, MONTH_S + DAY_S):
        history.add(run(at))
    assert [each.started_at for each in history.since("m", 0.0)] == [DAY_S, MONTH_S + DAY_S]
    history.close()


def test_processes_and_threads_share_a_file(tmp_path: Path) -> None:
    path = str(tmp_path / "history.db")
    first, second = CanaryHistory(path), CanaryHistory(path)

    def add(history: CanaryHistory, begin: int) -> None:
        for number in range(20):
            history.add(run(float(begin + number)))

    threads = [threading.Thread(target=add, args=(history, 100 * n)) for n, history in enumerate([first, second] * 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(first.since("m", 0.0)) == len(second.since("m", 0.0)) == 80
    first.close()
    second.close()


def test_files_that_are_no_use_are_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("this is no database, and long enough to be seen as none")
    newer = sqlite3.connect(tmp_path / "newer.db")
    newer.execute("PRAGMA user_version = 7")
    newer.close()
    for name in ("text", "newer.db", "text/below"):
        with pytest.raises(ConfigError, match="history file"):
            CanaryHistory(str(tmp_path / name))


def test_a_file_that_breaks_later_is_logged_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    history = CanaryHistory(str(tmp_path / "history.db"))
    history.close()
    history.add(run(10.0))
    assert list(history.since("m", 0.0)) == []
    assert "could not be kept" in caplog.text
    assert "could not be read" in caplog.text
