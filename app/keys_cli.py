"""`umbel-chat keys`: make, list and revoke API keys."""

import argparse
import sys
import time
from datetime import UTC, datetime

from app.api_keys import ApiKey, ApiKeys, KeyLimits
from app.config import SiteConfig
from app.database import Database
from app.durations import parse_duration_s
from swarm_protocol.errors import ConfigError


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the program's."""
    keys = commands.add_parser(
        "keys",
        help="make, list and revoke API keys",
        description="Make, list and revoke API keys. They are kept in the site's database (UMBEL_DATABASE_URL); a "
        "running site takes changes up within seconds. Keys of embedded chats are those of `umbel-chat widget`.",
    )
    actions = keys.add_subparsers(dest="action", required=True)
    create = actions.add_parser("create", help="make a key and print its secret, which is never shown again")
    create.add_argument("--name", required=True, help="for yourself: whose key it is")
    create.add_argument("--requests-per-minute", type=int, metavar="N", help="requests that generate")
    create.add_argument("--tokens-per-day", type=int, metavar="N", help="tokens of all its answers in a day of UTC")
    create.add_argument("--sessions", type=int, metavar="N", help="websockets and answers at once")
    create.add_argument("--expires-in", metavar="TIME", help="30m, 12h, 90d (default: never)")
    actions.add_parser("list", help="show the keys, without their secrets")
    revoke = actions.add_parser("revoke", help="let a key be used no more")
    revoke.add_argument("key", metavar="ID", help="as `list` shows it: uk_ and twelve hex digits")


def _day(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")


def _line(key: ApiKey, now: float) -> str:
    if key.revoked_at is not None:
        state = f"revoked {_day(key.revoked_at)}"
    elif key.is_usable(now):
        state = "in use" if key.expires_at is None else f"until {_day(key.expires_at)}"
    else:
        state = "expired"
    limits = ((key.requests_per_minute, "a minute"), (key.tokens_per_day, "tokens a day"), (key.sessions, "at once"))
    shown = [f"{limit} {what}" for limit, what in limits if limit is not None]
    return f"{key.id}  {state:18}  {_day(key.created_at)}  {key.name}" + (f"  ({', '.join(shown)})" if shown else "")


def run(options: argparse.Namespace, config: SiteConfig) -> int:
    """Carry out a parsed command; return the exit status. Raises ConfigError and DatabaseUnavailableError."""
    keys = ApiKeys(Database(config.database_url))
    match options.action:
        case "create":
            expires_s = None if options.expires_in is None else parse_duration_s(options.expires_in)
            limits = KeyLimits(options.requests_per_minute, options.tokens_per_day, options.sessions, expires_s)
            key, secret = keys.create(options.name, limits)
            sys.stderr.write(f"made {key.id}; its secret is shown this once:\n")
            sys.stdout.write(f"{secret}\n")
        case "list":
            now = time.time()
            sys.stdout.writelines(f"{_line(key, now)}\n" for key in keys.list())
        case _:
            # Whoever gives the whole secret means its key; it is not repeated in the error.
            key_id = "_".join(options.key.split("_")[:2])
            if not keys.revoke(key_id):
                raise ConfigError(f"there is no API key {key_id[:40]!r} in use")
    return 0
