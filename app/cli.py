"""`umbel-chat`: serve the chat site, look after its keys and its database, or run a demonstration on this machine."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from app import ban_cli, check_cli, database_cli, keys_cli, reports_cli, usage_cli, widget_cli
from app.config import SiteConfig, environment_config
from app.database import site_database
from app.errors import DatabaseUnavailableError
from app.logs import configure_logs
from app.moderation import check_hook
from swarm_protocol.errors import ConfigError

COMMANDS = {
    "keys": keys_cli.run,
    "widget": widget_cli.run,
    "ban": ban_cli.run,
    "reports": reports_cli.run,
    "usage": usage_cli.run,
    "database": database_cli.run,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="umbel-chat", description="A chat site in front of an Umbel swarm.")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser(
        "serve",
        help="serve the site",
        description="Serve the site. Every option may also be given by the environment: UMBEL_MODELS, "
        "UMBEL_INITIAL_PEERS, UMBEL_RELAY, UMBEL_HOST, PORT.",
    )
    for command in (serve, check_cli.add_parser(commands)):
        command.add_argument(
            "--model", action="append", metavar="MODEL", help="a hub name, folder or GGUF file; repeatable"
        )
        command.add_argument("--initial-peers", nargs="+", metavar="MADDR", help="multiaddresses of peers of the swarm")
        command.add_argument("--no-relay", action="store_true", help="do not reach nodes behind a NAT through relays")
        command.add_argument("--host", help="address to listen on (default 127.0.0.1)")
        command.add_argument("--port", type=int, help="port to listen on (default 5000)")
    keys_cli.add_parser(commands)
    widget_cli.add_parser(commands)
    ban_cli.add_parser(commands)
    usage_cli.add_parser(commands)
    database_cli.add_parser(commands)
    reports_cli.add_parser(commands)
    demo = commands.add_parser("demo", help="run two nodes and the site on this machine", add_help=False)
    demo.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser


def serve_config(options: argparse.Namespace, config: SiteConfig) -> SiteConfig:
    """Return `config` changed by the options of `serve` and `check`."""
    if options.model is not None:
        config = replace(config, models=tuple(options.model))
    if options.initial_peers is not None:
        config = replace(config, initial_peers=tuple(options.initial_peers))
    if options.no_relay:
        config = replace(config, relay=False)
    if options.host is not None:
        config = replace(config, host=options.host)
    if options.port is not None:
        config = replace(config, port=options.port)
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["demo"]:
        from app.demo import run_demo  # its nodes need packages that serving does not

        return int(run_demo(arguments[1:]) or 0)
    options = _parser().parse_args(arguments)
    try:
        config = environment_config()
        configure_logs(config.operation)
        if options.command in COMMANDS:
            return COMMANDS[options.command](options, config)
        config = serve_config(options, config)
        if options.command == "check":
            return check_cli.run(options, config)
        if not config.models:
            raise ConfigError("no model to serve: give --model or set UMBEL_MODELS")
        site_database(config.database_url).check()
        check_hook(config.operation)
    except (ConfigError, DatabaseUnavailableError) as error:
        sys.stderr.write(f"umbel-chat: {error}\n")
        return 2
    from app.server import serve  # after the arguments are known to be right: gunicorn is slow to import

    serve(config)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
