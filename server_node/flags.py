"""The flags of `umbel-node`, and the configuration that they make. `cli.py` gives them argv and the environment."""

import argparse
import re
from typing import NoReturn

from server_node.config import ComputeChoice, ModelChoice, NodeConfig, NodeLimits
from server_node.settings import Settings
from swarm_protocol.spans import Span
from swarm_protocol.transport.network_config import NetworkConfig

MAX_NAME_CHARS = 40
_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_MOST_SECONDS = 86_400.0
_LEAST_RATE = 125_000
"""Bytes/s: the largest frame, of 2 MiB, takes 17 s then, and may take 60."""


class _Parser(argparse.ArgumentParser):
    """argparse that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def node_config(arguments: argparse.Namespace) -> NodeConfig:
    """Return what `umbel-node run` is to do, as `arguments` have it."""
    return NodeConfig(
        model=_model_choice(arguments),
        compute=_compute_choice(arguments),
        network=network_config(arguments),
        limits=NodeLimits(
            max_sessions=arguments.max_sessions,
            max_sessions_per_peer=arguments.peer_sessions,
            max_cache_share_per_peer=arguments.peer_cache_share,
            drain_s=arguments.drain_timeout,
        ),
        name=arguments.name,
        only_when_idle=arguments.only_when_idle,
    )


def benchmark_config(arguments: argparse.Namespace) -> NodeConfig:
    """Return the node that `umbel-node benchmark` measures, as `arguments` have it."""
    return NodeConfig(_model_choice(arguments), _compute_choice(arguments))


def _model_choice(arguments: argparse.Namespace) -> ModelChoice:
    return ModelChoice(
        source=arguments.model,
        revision=arguments.revision,
        cache_dir=arguments.cache_dir,
        max_disk_bytes=arguments.max_disk,
        blocks=arguments.blocks,
        num_blocks=arguments.num_blocks,
    )


def _compute_choice(arguments: argparse.Namespace) -> ComputeChoice:
    return ComputeChoice(
        device=arguments.device,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        threads=arguments.threads,
        cache_tokens=arguments.cache_tokens,
        prefix_tokens=arguments.prefix_tokens,
    )


def network_config(arguments: argparse.Namespace) -> NetworkConfig:
    """Return how a peer takes part, as `arguments` have it."""
    return NetworkConfig(
        initial_peers=tuple(arguments.initial_peers),
        host=arguments.host,
        port=arguments.port,
        announce=tuple(arguments.announce),
        identity_path=arguments.identity,
        relay=arguments.relay,
        relay_for_others=arguments.relay_for_others,
        max_bytes_per_s=getattr(arguments, "max_bandwidth", None),
        map_ports=arguments.port_mapping,
    )


def settings() -> Settings:
    """Return all commands with their flags."""
    parser = _Parser(prog="umbel-node", description="Serve blocks of a language model to a swarm.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    run = commands.add_parser("run", help="serve blocks of a model")
    measure = commands.add_parser("benchmark", help="show how fast this machine is at blocks of a model")
    for command in (run, measure):
        _add_model_arguments(command)
        _add_compute_arguments(command)
    measure.add_argument("--refresh", action="store_true", help="forget what was measured on this machine before")
    _add_limit_arguments(run)
    bootstrap = commands.add_parser("bootstrap", help="be a first peer that others join at")
    for command in (run, measure, bootstrap):
        command.add_argument("--config", metavar="FILE", help="a TOML file with any of these flags; see the docs")
    for command in (run, bootstrap):
        _add_network_arguments(command)
    drain = commands.add_parser("drain", help="let a node that runs on this machine leave, and wait until it has")
    status = commands.add_parser("status", help="show what a node that runs on this machine does now")
    for command in (drain, status):
        command.add_argument("--identity", metavar="FILE", help="that of the node; default: the only node without one")
    status.add_argument("--json", action="store_true", help="for programs: one line of JSON")
    for command in (run, measure, bootstrap, drain, status):
        command.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    return Settings(parser, commands.choices)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="a folder of safetensors, a .gguf file, or a hub repository"
    )
    span = parser.add_mutually_exclusive_group()
    span.add_argument("--blocks", type=_span, metavar="0:15", help="serve exactly these blocks, the end excluded")
    span.add_argument(
        "--num-blocks", type=_positive, metavar="N", help="serve N blocks where fewest are held; default: all that fit"
    )  # fmt: skip
    parser.add_argument("--revision", help="the hub repository's branch, tag or commit")
    parser.add_argument("--cache-dir", metavar="FOLDER", help="where hub repositories are kept")
    parser.add_argument(
        "--max-disk", type=_size, metavar="SIZE",
        help="keep at most so much of downloaded parts of models, such as 50GB; default: no bound",
    )  # fmt: skip


def _add_compute_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … or several: cuda:0,cuda:1; default: cpu")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="auto, the default, is float32 on a CPU and the checkpoint's own elsewhere, or one that is measured to be "
        "a fifth faster",
    )  # fmt: skip
    parser.add_argument(
        "--quantization", default="none", choices=("none", "int8", "nf4"),
        help="hold the large weights in 8 or 4 bits; on a CPU nf4 is 4-bit integers in groups of 32; default: none",
    )  # fmt: skip
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads; 1 where nodes share a machine")
    parser.add_argument(
        "--cache-tokens", type=_positive, metavar="N", help="KV cache in tokens; default: half of the free memory"
    )
    parser.add_argument(
        "--prefix-tokens", type=_count, metavar="N",
        help="tokens of prompts to keep for later sessions; default: an eighth of the cache, 0 keeps none",
    )  # fmt: skip


def _add_limit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-sessions", type=_positive, default=NodeLimits().max_sessions, metavar="N",
        help="sessions that may be open at once; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--peer-sessions", type=_positive, default=NodeLimits().max_sessions_per_peer, metavar="N",
        help="how many of them one peer may have; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--max-bandwidth", type=_rate, metavar="RATE",
        help="in each direction, for all peers together, such as 20Mbit or 5MB (a second); default: no bound",
    )  # fmt: skip
    parser.add_argument(
        "--metrics-port", type=_port, default=0, metavar="N",
        help="port of this machine alone at which Prometheus finds metrics; default: 0, none",
    )  # fmt: skip
    parser.add_argument(
        "--peer-cache-share", type=_share, default=NodeLimits().max_cache_share_per_peer, metavar="X",
        help="how much of the cache one peer may take; default: %(default)s, 1 in a swarm of one's own",
    )  # fmt: skip
    parser.add_argument(
        "--drain-timeout", type=_seconds, default=NodeLimits().drain_s, metavar="S",
        help="seconds that open sessions have to move to other nodes when this one leaves; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--only-when-idle", action="store_true", help="pause, by draining, while the owner's programs use the device"
    )
    parser.add_argument("--name", default="", type=_name, help=f"shown to people, at most {MAX_NAME_CHARS} characters")


def _add_network_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--initial-peers", nargs="+", action="extend", default=[], metavar="MADDR",
        help="peers of the swarm to join; without any, a new swarm is started",
    )  # fmt: skip
    parser.add_argument("--host", default="0.0.0.0", metavar="ADDR", help="address to listen on; default: all")  # noqa: S104
    parser.add_argument("--port", type=_port, default=0, metavar="N", help="port to listen on; default: any free one")
    parser.add_argument(
        "--announce", nargs="+", action="extend", default=[], metavar="MADDR", help="addresses to tell others"
    )
    parser.add_argument("--identity", metavar="FILE", help="the peer's key, made if missing; default: a new one")
    relaying = parser.add_mutually_exclusive_group()
    relaying.add_argument(
        "--no-relay", dest="relay", action="store_false", help="do not reach others, nor be reached, through relays"
    )
    relaying.add_argument(
        "--relay-for-others", action="store_true", help="carry the traffic of nodes that cannot be reached directly"
    )
    parser.add_argument(
        "--no-port-mapping", dest="port_mapping", action="store_false", help="do not ask the router to forward the port"
    )


def _span(text: str) -> Span:
    try:
        return Span.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"a whole number above 0 is needed, not {text!r}")
    return int(text)


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0.0 < share <= 1.0:
        raise argparse.ArgumentTypeError(f"a share above 0 and up to 1 is needed, not {text!r}")
    return share


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])B?", text.upper())
    size_bytes = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if not size_bytes:
        raise argparse.ArgumentTypeError(f"a size above 0 is needed, such as 50GB or 800MB, not {text!r}")
    return size_bytes


def _rate(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGkmg])([Bb]it|B)(?:/s)?", text)
    rate = int(float(found[1]) * _UNITS[found[2].upper()] / (1 if found[3] == "B" else 8)) if found else 0
    if rate < _LEAST_RATE:
        raise argparse.ArgumentTypeError(f"a rate of at least 1Mbit is needed, such as 20Mbit or 5MB, not {text!r}")
    return rate


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0.0 <= seconds <= _MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"0 to {_MOST_SECONDS:g} seconds are possible, not {text!r}")
    return seconds


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"a port is 0 to 65535, not {text!r}")
    return int(text)


def _name(text: str) -> str:
    if len(text) > MAX_NAME_CHARS or not text.isprintable():
        raise argparse.ArgumentTypeError(f"at most {MAX_NAME_CHARS} printable characters, not {len(text)}")
    return text
