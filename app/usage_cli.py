"""`umbel-chat usage`: what was used, by day, key and model."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from app.config import SiteConfig
from app.database import Database
from app.usage import KEPT_DAYS, Amount, UsageBook, UsageRow
from app.usage_replies import date_of
from swarm_protocol.errors import ConfigError

NOBODY = "anonymous"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the program's."""
    usage = commands.add_parser(
        "usage",
        help="show what was used",
        description="Show requests, tokens and errors by day of UTC, key and model, as the site's database "
        "(UMBEL_DATABASE_URL) has them; a running site writes them every ten seconds.",
    )
    usage.add_argument("--key", metavar="ID", help=f"of one API or widget key, or `{NOBODY}` (default: all)")
    usage.add_argument("--days", type=int, default=30, metavar="N", help="the last days, today among them (default 30)")
    usage.add_argument("--json", action="store_true", help="one object a line, for programs")


def _lines(rows: Sequence[UsageRow]) -> list[str]:
    head = ("day", "key", "model", *(name.replace("_", " ") for name in Amount.__slots__))
    total = sum((row.amount for row in rows), Amount())
    table = [head, *(_cells(row) for row in rows), ("all", "", "", *map(str, asdict(total).values()))]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number < 3 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        for cells in table
    ]


def _cells(row: UsageRow) -> tuple[str, ...]:
    return (date_of(row.day), row.key_id or NOBODY, row.model, *map(str, asdict(row.amount).values()))


def run(options: argparse.Namespace, config: SiteConfig) -> int:
    """Carry out a parsed command; return the exit status. Raises ConfigError and DatabaseUnavailableError."""
    if not 1 <= options.days <= KEPT_DAYS:
        raise ConfigError(f"--days is 1 to {KEPT_DAYS}, not {options.days}")
    key_id = "" if options.key == NOBODY else options.key
    rows = UsageBook(Database(config.database_url)).rows(options.days, key_id)
    if options.json:
        for row in rows:
            told = {"date": date_of(row.day), "key": row.key_id or None, "model": row.model, **asdict(row.amount)}
            sys.stdout.write(json.dumps(told) + "\n")
    else:
        sys.stdout.writelines(f"{line}\n" for line in _lines(rows))
    return 0
