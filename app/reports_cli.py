"""`umbel-chat reports`: read what readers reported, and delete it."""

import argparse
import sys
from collections.abc import Iterator
from datetime import UTC, datetime

from app.config import SiteConfig
from app.database import Database
from app.reports import Report, Reports
from swarm_protocol.errors import ConfigError

LINE_CHARS = 60


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the program's."""
    reports = commands.add_parser(
        "reports",
        help="read and delete reported answers",
        description="Read and delete what readers reported, where UMBEL_REPORTS lets them.",
    )
    actions = reports.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="show all in a line each, the newest first")
    show = actions.add_parser("show", help="show one, with the conversation if its reader sent that")
    delete = actions.add_parser("delete", help="delete some")
    show.add_argument("id", type=int)
    delete.add_argument("id", type=int, nargs="+")


def run(options: argparse.Namespace, config: SiteConfig) -> int:
    """Carry out a parsed command; return the exit status. Raises ConfigError and DatabaseUnavailableError."""
    reports = Reports(Database(config.database_url), config.operation.reports_days)
    match options.action:
        case "list":
            sys.stdout.writelines(f"{_line(report)}\n" for report in reports.list())
        case "show":
            found = reports.find(options.id)
            if found is None:
                raise ConfigError(f"there is no report {options.id}")
            sys.stdout.writelines(f"{line}\n" for line in _page(found))
        case _:
            missing = [each for each in options.id if not reports.delete(each)]
            if missing:
                raise ConfigError(f"there is no report {', '.join(map(str, missing))}")
    return 0


def _line(report: Report) -> str:
    has_text = "with text" if report.conversation is not None else "no text"
    comment = _visible(" ".join(report.comment.split()))
    short = comment if len(comment) <= LINE_CHARS else f"{comment[: LINE_CHARS - 1]}…"
    return f"{report.id:5}  {_at(report)}  {report.reason:8}  {has_text:9}  {_visible(report.model)}  {short}".rstrip()


def _page(report: Report) -> Iterator[str]:
    yield f"report {report.id} of {_at(report)} UTC, {report.reason}, model {_visible(report.model) or 'not named'}"
    yield f"request {report.request_id}"
    if report.comment:
        yield f"\n{_visible(report.comment)}"
    if report.conversation is None:
        yield "\nThe reader did not send the conversation."
    for role, said in report.conversation or ():
        yield f"\n{role}:\n{_visible(said)}"


def _at(report: Report) -> str:
    return datetime.fromtimestamp(report.created_at, UTC).strftime("%Y-%m-%d %H:%M")


def _visible(text: str) -> str:
    """Return a stranger's text without what would move a terminal's cursor or change its settings."""
    return "".join(char if char.isprintable() or char == "\n" else "�" for char in text)
