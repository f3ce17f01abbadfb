"""`umbel-chat database`: bring the tables up to date, or say what they are."""

import argparse
import sys

from app.config import SiteConfig
from app.database import Database
from app.schema import SchemaState

_SAID = {
    SchemaState.EMPTY: "no tables yet",
    SchemaState.BEHIND: "of an older version: run `umbel-chat database upgrade`",
    SchemaState.CURRENT: "up to date",
    SchemaState.NEWER: "of a newer version of this program",
}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the program's."""
    database = commands.add_parser(
        "database",
        help="bring the site's database up to date",
        description="Look after the database that UMBEL_DATABASE_URL names: sqlite:///FILE or postgresql://…",
    )
    actions = database.add_subparsers(dest="action", required=True)
    actions.add_parser("upgrade", help="make the tables, or change them to what this version needs")
    actions.add_parser("status", help="say where it is and whether it is up to date; status 1 if it is not")


def run(options: argparse.Namespace, config: SiteConfig) -> int:
    """Carry out a parsed command; return the exit status. Raises ConfigError."""
    database = Database(config.database_url)
    if options.action == "upgrade":
        database.upgrade()
    state = database.state()
    sys.stdout.write(f"{database.shown_url}: {_SAID[state]}\n")
    return 0 if state is SchemaState.CURRENT else 1
