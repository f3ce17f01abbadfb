"""`umbel-chat check`: look at all that a site needs, before it is started or while it runs, and change nothing."""

import argparse
import http.client
import logging
import os
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import psutil

from app.check import (
    Finding,
    as_json,
    descriptors_finding,
    exit_status,
    memory_findings,
    model_finding,
    proxies_finding,
    screen,
    secrets_finding,
)
from app.config import SiteConfig
from app.database import Database
from app.limit_store import RedisCounts
from app.moderation import load_hook
from app.own_version import site_version
from app.schema import SchemaState
from app.swarm_report import Circumstances, model_report
from swarm_protocol.errors import ConfigError, SwarmError
from swarm_protocol.ids import PeerId, short_peer

if TYPE_CHECKING:
    from swarm_client import Swarm
    from swarm_client.model_facts import ModelFacts

PROBE_S = 3.0

Look = Callable[[SiteConfig], Iterator[Finding]]


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Add the command to the program's; the options that name the swarm are the caller's to add."""
    check = commands.add_parser(
        "check",
        help="look at configuration, database, memory and swarm",
        description="Look at all that the site needs, with the settings that it would start with. Ends with status 1 "
        "if something does not work.",
    )
    check.add_argument("--json", action="store_true", help="one line of JSON instead of a screen")
    return check


def run(options: argparse.Namespace, config: SiteConfig) -> int:
    """Look, show what was found, and return the exit status."""
    logging.getLogger().setLevel(logging.ERROR)  # what the libraries say belongs to no screen
    findings = [finding for look in LOOKS for finding in look(config)]
    has_colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    sys.stdout.write(as_json(findings) if options.json else screen(findings, has_colours=has_colours))
    return exit_status(findings)


def _configuration(config: SiteConfig) -> Iterator[Finding]:
    models = ", ".join(os.path.basename(model.rstrip("/")) for model in config.models)
    if not config.models:
        yield Finding("configuration", "bad", "no model: set UMBEL_MODELS")
    elif not config.initial_peers:
        yield Finding("configuration", "bad", "no peer to join the swarm at: set UMBEL_INITIAL_PEERS")
    else:
        yield Finding("configuration", "ok", f"{models}, on {config.host}:{config.port}")
    if config.operation.log_prompts:
        yield Finding("configuration", "warn", "UMBEL_LOG_PROMPTS is on: the log holds what readers write")
    if config.operation.moderation:
        try:
            load_hook(config.operation.moderation)
        except ConfigError as error:
            yield Finding("moderation", "bad", str(error))
        else:
            yield Finding("moderation", "ok", config.operation.moderation)
    yield secrets_finding(config)
    yield proxies_finding(config)
    yield descriptors_finding(config, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _ports(config: SiteConfig) -> Iterator[Finding]:
    hosts = config.security.trusted_hosts
    yield _port("site's port", config.host, config.port, "/healthz", "status", hosts[0].lstrip(".") if hosts else None)
    operation = config.operation
    if operation.health_port:
        yield _port("health port", operation.health_host, operation.health_port, "/health/ready", "models")
    else:
        text = "off (UMBEL_HEALTH_PORT): no probe when all threads are taken, and no metrics"
        yield Finding("health port", "warn", text)


def _port(subject: str, host: str, port: int, path: str, expected: str, asked_host: str | None = None) -> Finding:
    """Say whether a site answers there, or could listen there. `asked_host` is a name that the site answers to."""
    asked = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host  # noqa: S104
    connection = http.client.HTTPConnection(asked, port, timeout=PROBE_S)
    try:
        connection.request("GET", path, headers={"Host": asked_host} if asked_host else {})
        reply = connection.getresponse()
        body = reply.read(4096)
    except (OSError, http.client.HTTPException):
        return _free_port(subject, host, port)
    finally:
        connection.close()
    if f'"{expected}"'.encode() not in body:
        return Finding(subject, "bad", f"{asked}:{port} is taken by something else")
    return Finding(subject, "ok", f"a site answers on {asked}:{port}")


def _free_port(subject: str, host: str, port: int) -> Finding:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        return Finding(subject, "bad", f"{host}:{port} cannot be listened on, and no site answers: {_plain(error)}")
    return Finding(subject, "ok", f"{host}:{port} is free; no site runs there")


def _plain(error: OSError) -> str:
    return str(error.strerror).partition(" (while")[0]  # Python adds the address, which is told already


def _database(config: SiteConfig) -> Iterator[Finding]:
    try:
        database = Database(config.database_url)
        state, where = database.state(), database.shown_url
    except ConfigError as error:
        yield Finding("database", "bad", str(error))
        return
    match state:
        case SchemaState.CURRENT:
            yield Finding("database", "ok", f"{where}, up to date")
        case SchemaState.EMPTY | SchemaState.BEHIND if database.is_sqlite:
            yield Finding("database", "ok", f"{where}; the site makes what is missing")
        case SchemaState.NEWER:
            yield Finding("database", "bad", f"{where} is of a newer version of this program")
        case _:
            yield Finding("database", "bad", f"{where} is not up to date: run `umbel-chat database upgrade`")


def _limits(config: SiteConfig) -> Iterator[Finding]:
    limits = config.limits
    if not limits.limits_url:
        yield Finding("limits", "ok", "counted by this process alone; several need UMBEL_LIMITS_URL")
        return
    try:
        counts = RedisCounts(limits.limits_url)
        problem = counts.problem()
    except ConfigError as error:
        problem = str(error)
    if problem:
        yield Finding("limits", "bad", f"Redis does not answer, each process counts alone: {problem}")
    else:
        yield Finding("limits", "ok", "counted in Redis, which answers")


def _swarm(config: SiteConfig) -> Iterator[Finding]:
    if not config.initial_peers:
        return
    from swarm_client import ClientConfig, Swarm  # loads the numeric libraries

    try:
        swarm = Swarm.connect(
            ClientConfig(initial_peers=config.initial_peers, relay=config.relay, wire_dtype=config.wire_dtype)
        )
    except SwarmError as error:
        yield Finding("swarm", "bad", f"not reached: {error}")
        return
    try:
        yield from _peers(swarm, config)
        yield from _models(swarm, config)
    finally:
        swarm.close()


def _peers(swarm: "Swarm", config: SiteConfig) -> Iterator[Finding]:
    for address in config.initial_peers:
        peer_id = PeerId(address.rpartition("/p2p/")[2])
        try:
            elapsed_s = swarm.ping(peer_id)
        except SwarmError as error:  # another one was reached, or there would be no swarm
            yield Finding("swarm", "warn", f"first peer {short_peer(peer_id)} does not answer ({error.code})")
        else:
            yield Finding("swarm", "ok", f"first peer {short_peer(peer_id)} answers in {1000 * elapsed_s:.0f} ms")


def _models(swarm: "Swarm", config: SiteConfig) -> Iterator[Finding]:
    from swarm_client.model_facts import model_facts

    facts: list[ModelFacts] = []
    for source in config.models:
        try:
            facts.append(model_facts(source, swarm))
        except SwarmError as error:
            yield Finding(f"model {os.path.basename(source.rstrip('/'))}", "bad", str(error))
    for fact in facts:
        report = model_report(fact.swarm, fact.block_size, Circumstances(0, 0, None, site_version()))
        yield model_finding(report)
    ends = [(fact.name, fact.ends_bytes) for fact in facts]
    yield from memory_findings(ends, int(psutil.virtual_memory().available))


LOOKS: tuple[Look, ...] = (_configuration, _ports, _database, _limits, _swarm)
