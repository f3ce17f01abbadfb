"""Pure: what `umbel-chat check` makes of what it found, and how that is shown.

ok     as it should be
warn   it works, and somebody should know
bad    it does not work: the exit status is 1
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from typing import Literal

from app.config import SiteConfig
from app.swarm_report import ModelReport
from swarm_protocol.spans import describe_blocks

State = Literal["ok", "warn", "bad"]

COLOURS: dict[State, str] = {"ok": "\x1b[32m", "warn": "\x1b[33m", "bad": "\x1b[31m"}
PLAIN = "\x1b[0m"

MIN_SECRET_CHARS = 16
MANY_PROXIES = 3  # a site behind a content network, a host's router and an nginx has three
LOADING_FACTOR = 2.0  # of the largest model's ends, while they are read (measured: 2.05 for a GGUF file)
NEAR_SHARE = 0.8
DESCRIPTORS_BESIDE = 300  # of the swarm's connections, files and the database; each websocket has two


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the screen."""

    subject: str
    state: State
    text: str


def size(num_bytes: float) -> str:
    """Return bytes as people read them."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


def secrets_finding(config: SiteConfig) -> Finding:
    """Judge the signing secrets, without showing anything of them."""
    known = config.security.signing_secrets
    if not known:
        return Finding("secrets", "warn", "UMBEL_SIGNING_SECRETS is empty: embedded chats reconnect after each restart")
    if min(map(len, known)) < MIN_SECRET_CHARS:
        return Finding("secrets", "bad", f"a signing secret has fewer than {MIN_SECRET_CHARS} characters")
    return Finding("secrets", "ok", f"{len(known)} signing secret{'s' if len(known) > 1 else ''}; the last one signs")


def proxies_finding(config: SiteConfig) -> Finding:
    """Judge whether the number of trusted proxies fits the rest."""
    number, security = config.security.trusted_proxies, config.security
    if number < 0:
        return Finding("proxies", "bad", f"UMBEL_TRUSTED_PROXIES is {number}")
    if number > MANY_PROXIES:
        text = f"{number} proxies are trusted; with fewer in front, readers choose their own address"
        return Finding("proxies", "warn", text)
    if number and not _is_loopback(config.host):
        text = f"{number} trusted, but {config.host} is open to others, who can come past them with any address"
        return Finding("proxies", "warn", text)
    if number == 0 and security.hsts:
        return Finding("proxies", "bad", "UMBEL_HSTS is on, but no proxy is trusted: nothing here speaks HTTPS itself")
    if number == 0 and _is_loopback(config.host):
        text = "none trusted: right for this machine alone; behind a proxy, all readers have its address"
        return Finding("proxies", "warn", text)
    return Finding("proxies", "ok", f"{number} trusted" if number else "none, and readers reach the site itself")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def memory_findings(ends: Sequence[tuple[str, int]], free_bytes: int) -> list[Finding]:
    """Judge whether the ends of all models, by name, fit into what is free, the largest one twice while it is read."""
    needed = sum(num_bytes for _, num_bytes in ends)
    peak = needed + (LOADING_FACTOR - 1) * max((num_bytes for _, num_bytes in ends), default=0)
    state: State = "bad" if peak > free_bytes else "warn" if peak > NEAR_SHARE * free_bytes else "ok"
    found = [Finding("memory", state, f"ends of {name}: {size(num_bytes)}") for name, num_bytes in ends]
    told = f"all ends: {size(needed)}, {size(peak)} while they are read; free now: {size(free_bytes)}"
    return [*found, Finding("memory", state, told)] if ends else []


def model_finding(report: ModelReport) -> Finding:
    """Say whether one can chat with a model, else what is missing."""
    serving = sum(node.state == "online" for node in report.nodes)
    nodes = f"{serving} node{'' if serving == 1 else 's'}"
    missing = ", ".join(describe_blocks(span) for span in report.missing)
    need = f"; {size(report.needed.plain_bytes)} more memory at nodes would complete it" if report.needed else ""
    match report.state:
        case "ready":
            text = f"complete: all {report.num_blocks} blocks at two nodes or more, {nodes}"
            return Finding(f"model {report.name}", "ok", text)
        case "degraded":
            text = f"complete, but a loss would stop answers: some blocks at one node alone, {nodes}"
            return Finding(f"model {report.name}", "warn", text)
        case "incomplete":
            return Finding(f"model {report.name}", "bad", f"incomplete: {missing} missing, {nodes}{need}")
        case _:
            return Finding(f"model {report.name}", "bad", f"no node serves any of its blocks{need}")


def descriptors_finding(config: SiteConfig, most: int) -> Finding:
    """Judge whether the process may have as many descriptors as its websockets and requests need."""
    needed = 2 * config.sockets.ws_max + config.http_threads + DESCRIPTORS_BESIDE
    state: State = "ok" if most >= needed else "bad"
    return Finding("descriptors", state, f"{most} allowed (ulimit -n), up to {needed} used")


def exit_status(findings: Sequence[Finding]) -> int:
    """Return 1 if something does not work."""
    return int(any(finding.state == "bad" for finding in findings))


def screen(findings: Sequence[Finding], *, has_colours: bool) -> str:
    """Return the findings as lines, and what they come to."""
    width = max((len(finding.subject) for finding in findings), default=0)
    lines = []
    for finding in findings:
        state = finding.state.ljust(4) if finding.state != "bad" else "BAD "
        mark = f"{COLOURS[finding.state]}{state}{PLAIN}" if has_colours else state
        lines.append(f"{mark}  {finding.subject.ljust(width)}  {finding.text}\n")
    bad, warn = (sum(finding.state == state for finding in findings) for state in ("bad", "warn"))
    end = f"{bad} bad, {warn} to know of" if bad or warn else "all is well"
    return "".join([*lines, f"\n{end}\n"])


def as_json(findings: Sequence[Finding]) -> str:
    """Return the findings as one line of JSON."""
    return json.dumps({"ok": not exit_status(findings), "findings": [asdict(finding) for finding in findings]}) + "\n"
