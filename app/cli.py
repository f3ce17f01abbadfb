"""`umbel-chat`: serve the chat site, make keys of embedded chats, or run a demonstration on this machine."""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace

from app import widget_cli
from app.config import SiteConfig, environment_config
from swarm_protocol.errors import ConfigError

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="umbel-chat", description="A chat site in front of an Umbel swarm.")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser(
        "serve",
        help="serve the site",
        description="Serve the site. Every option may also be given by the environment: UMBEL_MODELS, "
        "UMBEL_INITIAL_PEERS, UMBEL_RELAY, UMBEL_HOST, PORT.",
    )
    serve.add_argument("--model", action="append", metavar="MODEL", help="a hub name, folder or GGUF file; repeatable")
    serve.add_argument("--initial-peers", nargs="+", metavar="MADDR", help="multiaddresses of peers of the swarm")
    serve.add_argument("--no-relay", action="store_true", help="do not reach nodes behind a NAT through relays")
    serve.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to listen on (default 5000)")
    widget_cli.add_parser(commands)
    demo = commands.add_parser("demo", help="run two nodes and the site on this machine", add_help=False)
    demo.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser


def serve_config(options: argparse.Namespace, config: SiteConfig) -> SiteConfig:
    """Return `config` changed by the options of `serve`. Raises ConfigError when there is no model to serve."""
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
    if not config.models:
        raise ConfigError("no model to serve: give --model or set UMBEL_MODELS")
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["demo"]:
        from app.demo import run_demo  # its nodes need packages that serving does not

        return int(run_demo(arguments[1:]) or 0)
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)
    # Its lines show links to a hub's storage, which open it for whoever has them.
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    try:
        if options.command == "widget":
            return widget_cli.run(options, environment_config())
        config = serve_config(options, environment_config())
    except ConfigError as error:
        sys.stderr.write(f"umbel-chat: {error}\n")
        return 2
    from app.server import serve  # after the arguments are known to be right: gunicorn is slow to import

    serve(config)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
