"""`umbel-chat widget`: make, list and revoke the keys with which other pages embed the chat."""

import argparse
import sys
from datetime import UTC, datetime

from app.config import SiteConfig
from app.database import Database
from app.widget_keys import THEMES, WidgetKey, WidgetKeys
from swarm_protocol.errors import ConfigError


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the program's."""
    widget = commands.add_parser(
        "widget",
        help="make, list and revoke keys of embedded chats",
        description="Make, list and revoke the keys with which other pages embed the chat. They are kept in the "
        "site's database (UMBEL_DATABASE_URL); a running site takes changes up within seconds.",
    )
    actions = widget.add_subparsers(dest="action", required=True)
    create = actions.add_parser("create", help="make a key and print it")
    create.add_argument("--name", required=True, help="for yourself: whose key it is")
    create.add_argument(
        "--origin", action="append", required=True, help="scheme://host[:port] of pages that may show it; repeatable"
    )
    create.add_argument("--only-model", metavar="ID", help="the model of its chats (default: the site's first)")
    create.add_argument("--system-prompt", default="", help="said to the model before each chat")
    create.add_argument("--theme", choices=THEMES, default="auto", help="colours where the page says nothing")
    create.add_argument("--requests-per-minute", type=int, metavar="N", help="questions of all its readers together")
    create.add_argument("--tokens-per-day", type=int, metavar="N", help="tokens of all its answers in a day of UTC")
    actions.add_parser("list", help="show the keys")
    revoke = actions.add_parser("revoke", help="let a key be used no more")
    revoke.add_argument("key")


def _line(key: WidgetKey) -> str:
    made = datetime.fromtimestamp(key.created_at, UTC).strftime("%Y-%m-%d")
    state = "in use" if key.is_enabled else "revoked"
    return f"{key.key}  {state:7}  {made}  {key.name}  {' '.join(key.origins)}"


def run(options: argparse.Namespace, config: SiteConfig) -> int:
    """Carry out a parsed command; return the exit status. Raises ConfigError and DatabaseUnavailableError."""
    keys = WidgetKeys(Database(config.database_url))
    match options.action:
        case "create":
            key = keys.create(
                name=options.name,
                origins=options.origin,
                model=options.only_model,
                system_prompt=options.system_prompt,
                theme=options.theme,
                requests_per_minute=options.requests_per_minute,
                tokens_per_day=options.tokens_per_day,
            )
            sys.stdout.write(f"{key.key}\n")
        case "list":
            sys.stdout.writelines(f"{_line(key)}\n" for key in keys.list())
        case _:
            if not keys.revoke(options.key):
                raise ConfigError(f"there is no widget key {options.key[:40]!r}")
    return 0
