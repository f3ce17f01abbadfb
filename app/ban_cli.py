"""`umbel-chat ban`: shut addresses, networks and keys out, and let them in again."""

import argparse
import sys
from datetime import UTC, datetime

from app.ban_rules import Ban
from app.bans import Bans
from app.config import SiteConfig
from app.database import Database
from app.durations import parse_duration_s
from swarm_protocol.errors import ConfigError


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the program's."""
    ban = commands.add_parser(
        "ban",
        help="shut addresses, networks and keys out",
        description="Shut addresses, networks (192.0.2.0/24, 2001:db8::/64) and keys (uk_…, wk_…) out. Bans are kept "
        "in the site's database (UMBEL_DATABASE_URL) and hold in all running sites within 5 seconds.",
    )
    actions = ban.add_subparsers(dest="action", required=True)
    add = actions.add_parser("add", help="shut somebody out; a ban of the same is replaced")
    add.add_argument("target", metavar="ADDRESS|NETWORK|KEY")
    add.add_argument("--reason", default="", help="for yourself; those who are shut out are not told")
    add.add_argument("--expires-in", metavar="TIME", help="30m, 12h, 90d (default: never)")
    actions.add_parser("list", help="show the bans that hold")
    remove = actions.add_parser("remove", help="let somebody in again")
    remove.add_argument("target", metavar="ADDRESS|NETWORK|KEY")


def _line(ban: Ban) -> str:
    made = datetime.fromtimestamp(ban.created_at, UTC).strftime("%Y-%m-%d")
    if ban.expires_at is None:
        until = "for good"
    else:
        until = datetime.fromtimestamp(ban.expires_at, UTC).strftime("until %Y-%m-%d %H:%M UTC")
    return f"{ban.target}  {made}  {until}  {ban.reason}".rstrip()


def run(options: argparse.Namespace, config: SiteConfig) -> int:
    """Carry out a parsed command; return the exit status. Raises ConfigError and DatabaseUnavailableError."""
    bans = Bans(Database(config.database_url))
    match options.action:
        case "add":
            expires_s = None if options.expires_in is None else parse_duration_s(options.expires_in)
            sys.stdout.write(f"{_line(bans.add(options.target, options.reason, expires_s))}\n")
        case "list":
            sys.stdout.writelines(f"{_line(ban)}\n" for ban in bans.list())
        case _:
            if not bans.remove(options.target):
                raise ConfigError(f"{options.target[:60]!r} is not banned")
    return 0
