"""Reports of answers: who may send them, what is kept of them, and how those who run the site read them."""

import json
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from app.cli import main
from app.config import OperationConfig, SiteConfig
from app.database import IN_MEMORY, Database
from app.factory import create_app, site_of
from app.model_registry import ModelRegistry
from app.reports import DAY_S, HOUR_S, HOURLY, HOURLY_PER_ADDRESS, ReportRate, ReportRequest, Reports
from swarm_protocol.errors import LimitExceededError
from tests.app.test_check import log_as_before  # noqa: F401  the command sets the log up

OWN = {"Origin": "http://localhost"}
SAID = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]


def make_app(url: str = IN_MEMORY, *, reports: bool = True) -> Flask:
    config = SiteConfig(database_url=url, operation=OperationConfig(reports=reports))
    return create_app(config, ModelRegistry([]))


def kept(app: Flask) -> list[Any]:
    return list(Reports(site_of(app).database, 90.0).list())


def send(app: Flask, headers: dict[str, str] | None = None, **values: object) -> Any:
    return app.test_client().post("/api/v2/reports", json=values, headers=OWN if headers is None else headers)


def test_a_report_is_kept_without_the_conversation_unless_it_is_sent() -> None:
    app = make_app()
    assert send(app, reason="false", comment="no such flower", model="m").status_code == 204
    assert send(app, reason="other", conversation=SAID).status_code == 204
    second, first = kept(app)
    assert (first.reason, first.comment, first.model, first.conversation) == ("false", "no such flower", "m", None)
    assert second.conversation == (("user", "a question"), ("assistant", "an answer"))
    assert first.request_id


def test_a_site_takes_none_unless_it_wants_them() -> None:
    app = make_app(reports=False)
    assert send(app, reason="false").status_code == 404
    assert kept(app) == []
    assert b'"reports": false' in app.test_client().get("/").data


@pytest.mark.parametrize("headers", [{}, {"Origin": "null"}, {"Origin": "https://evil.example"}])
def test_other_pages_and_programs_cannot_report(headers: dict[str, str]) -> None:
    app = make_app()
    found = send(app, headers, reason="false")
    assert (found.status_code, found.json["error"]["code"]) == (403, "origin_not_allowed")
    assert kept(app) == []


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"reason": "boring"},
        {"reason": "false", "comment": "x" * 2001},
        {"reason": "false", "conversation": [{"role": "nobody", "content": "x"}]},
        {"reason": "false", "conversation": [{"role": "user", "content": "x" * 400_001}]},
        {"reason": "false", "conversation": SAID * 201},
    ],
)
def test_what_is_no_report_is_refused(values: dict[str, object]) -> None:
    app = make_app()
    found = send(app, **values)
    assert (found.status_code, found.json["error"]["code"]) == (400, "invalid_request")
    assert kept(app) == []


def test_a_script_cannot_fill_the_database() -> None:
    now_s = 0.0
    rate = ReportRate(lambda: now_s)
    for _ in range(HOURLY_PER_ADDRESS):
        rate.count("192.0.2.1")
    with pytest.raises(LimitExceededError):
        rate.count("192.0.2.1")
    for number in range(HOURLY - HOURLY_PER_ADDRESS):
        rate.count(f"198.51.100.{number}")
    with pytest.raises(LimitExceededError):
        rate.count("192.0.2.2")
    now_s = HOUR_S
    rate.count("192.0.2.1")


def test_old_reports_are_gone(database_url: str) -> None:
    now = 1e9
    reports = Reports(_fresh(database_url), 90.0, lambda: now)
    reports.add(ReportRequest(reason="other", comment="old\0er"), "r")
    now += 89 * DAY_S
    assert [report.comment for report in reports.list()] == ["older"]
    now += 2 * DAY_S
    assert reports.list() == []
    reports.add(ReportRequest(reason="other", comment="new"), "r")
    now -= 2 * DAY_S
    assert [report.comment for report in reports.list()] == ["new"]


def _fresh(url: str) -> Database:
    database = Database(url)
    database.upgrade()
    return database


def test_those_who_run_the_site_read_and_delete_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path}/site.db"
    monkeypatch.setenv("UMBEL_DATABASE_URL", url)
    assert main(["reports", "list"]) == 0
    assert capsys.readouterr().out == ""
    app = make_app(url)
    send(app, reason="harmful", comment="look\nat \x1b[2Jthis " + "x" * 80, model="m", conversation=SAID)
    send(app, reason="false")
    assert main(["reports", "list"]) == 0
    second, first = capsys.readouterr().out.splitlines()
    assert ("no text" in second, "with text" in first, first[-1]) == (True, True, "…")
    assert main(["reports", "show", "1"]) == 0
    shown = capsys.readouterr().out
    assert "assistant:\nan answer\n" in shown
    assert "\x1b" not in first + shown
    assert main(["reports", "show", "2"]) == 0
    assert "did not send the conversation" in capsys.readouterr().out
    assert main(["reports", "delete", "1", "9"]) == 2
    assert "no report 9" in capsys.readouterr().err
    assert [report.id for report in kept(app)] == [2]


def test_a_report_is_in_no_log(caplog: pytest.LogCaptureFixture) -> None:
    app = make_app()
    with caplog.at_level("DEBUG"):
        send(app, reason="false", comment="zebra4711", conversation=[{"role": "user", "content": "zebra4711"}])
        send(app, reason="boring", comment="zebra4711")
    assert "zebra4711" not in caplog.text
    assert "zebra4711" in json.dumps([report.comment for report in kept(app)])
