"""The site's settings: frozen dataclasses, and the environment variables that fill them.

Every variable has the field's name in capitals with `UMBEL_` in front (`UMBEL_WS_MAX`), but `PORT`, which hosts set.
Lists are separated by commas or white space.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

from swarm_client.generation.speculation import check_draft_quantization, check_speculation
from swarm_client.wire_choice import check_choice
from swarm_protocol.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SocketLimits:
    """What one websocket, and all of them together, may use."""

    ws_max: int = 200  # sockets; each holds a pool thread and a reader thread, 64 kB (measured 2026-11)
    max_frame_bytes: int = 262_144  # a conversation of 8,000 tokens is about 40 kB
    max_queued_frames: int = 64  # frames waiting while an answer is generated; a person's page sends one or two
    max_queued_bytes: int = 1_048_576  # of the same queue
    idle_s: float = 300.0  # the predecessor's limit
    send_timeout_s: float = 10.0  # a reader that takes nothing for so long is dropped
    stall_s: float = 30.0  # a request whose next piece takes longer is dropped; browsers send all at once
    ws_per_address: int = 0  # sockets of one address with protocol 3; 0 for no limit, as behind proxies that hide them
    heartbeat_s: float = 5.0  # pages take 20 s of silence for a loss
    resume_grace_s: float = 30.0  # an answer goes on so long without its socket
    resume_text_s: float = 600.0  # its text is kept so long after its end
    resume_ring_bytes: int = 262_144  # of text and events of one answer; what is older cannot be resumed
    resume_per_address: int = 8  # answers of one address without a socket; tabs of one person
    resume_max: int = 64  # of all addresses: 16 MiB with full rings
    ping_interval_s: float = 25.0  # below the idle limits of proxies: 55 s and more
    drain_s: float = 20.0  # how long running answers may go on after SIGTERM; hosts kill after 30 s


@dataclass(frozen=True, slots=True)
class GenerationLimits:
    """Bounds and defaults of one generation."""

    session_max_length: int = 8192  # tokens; a model's own limit applies too
    max_new_tokens: int = 1024  # of an answer whose request names no number, or a higher one
    running_max: int = 64  # of all APIs at the same time; further ones wait in the queue
    waiting_max: int = 200  # in the queue; further ones are refused
    http_max: int = 24  # HTTP requests that generate at the same time
    sse_ping_interval_s: float = 10.0  # signs of life in HTTP streams; the shortest idle limits of proxies are 30 s
    temperature: float = 0.6  # when a request of protocol 3 or an OpenAI path names none; 0 is greedy
    top_p: float = 0.9  # likewise


@dataclass(frozen=True, slots=True)
class StatusConfig:
    """What the site tells of the swarm, and how it finds out."""

    events_max: int = 12  # listeners to the swarm's events, at most a quarter of http_threads; others ask again
    events_s: float = 900.0  # after which a listener has to come again, so that all get a turn
    canary_s: float = 600.0  # between two test answers of a model, made when nobody waits; 0 for none
    canary_tokens: int = 16  # of a test answer: enough for a speed, a second or two of the swarm's time


@dataclass(frozen=True, slots=True)
class SecurityConfig:
    """Who may use what from where."""

    public_api: bool = True  # the v1 and v2 API for everybody; no cookie is involved
    allowed_origins: tuple[str, ...] = ()  # pages of other origins that may use everything, as scheme://host[:port]
    trusted_hosts: tuple[str, ...] = ()  # Host headers that are answered; empty for all
    trusted_proxies: int = 0  # proxies in front whose X-Forwarded-* headers are believed
    signing_secrets: tuple[str, ...] = ()  # of tokens, the newest last; none for one that lasts as long as the process
    require_key: bool = False  # an API key for every program; the site's own pages go on without
    hsts: bool = False  # only for sites that are reached by HTTPS alone


@dataclass(frozen=True, slots=True)
class AddressLimits:
    """What somebody without a key may use, by address; 0 for no limit, since a class room may have one address."""

    limits_url: str = ""  # redis://… where all processes of a site count, keys' limits too; empty for each by itself
    address_requests_per_minute: int = 0
    address_tokens_per_day: int = 0
    address_sessions: int = 0  # websockets and HTTP answers at once


@dataclass(frozen=True, slots=True)
class OperationConfig:
    """What those who run the site see of it, and where."""

    log_format: str = "text"  # of the log on stderr: `text` for people, `json` for collectors
    log_addresses: bool = False  # of readers, in the lines of their requests
    log_prompts: bool = False  # prompts and answers in the log; readers do not expect that
    health_port: int = 0  # of a listener of its own for probes and the operator's metrics; 0 for none
    health_host: str = "127.0.0.1"  # whoever reaches it sees how the site is used
    reports: bool = False  # whether readers may report answers
    reports_days: float = 90.0  # that a report is kept: long enough to act on it
    moderation: str = ""  # module:function that may refuse prompts and answers; empty for none
    moderation_fail_open: bool = False  # what it does not judge is refused: whoever wants a check wants it always
    moderation_timeout_s: float = 10.0  # of one call; a small classifier takes 0.1 s, another site's API 1 s
    moderation_step_chars: int = 400  # of an answer, after which it is asked though no sentence has ended


@dataclass(frozen=True, slots=True)
class SiteConfig:
    """Everything that `umbel-chat serve` can be told."""

    models: tuple[str, ...] = ()  # what swarm_client opens: a hub name, a folder, a GGUF file
    initial_peers: tuple[str, ...] = ()  # multiaddresses of peers through which the swarm is joined
    relay: bool = True  # nodes behind a NAT are reached through relays; without, the site listens for no peer at all
    wire_dtype: str = "auto"  # in what hidden states travel, as `ClientConfig.wire_dtype`
    speculation: str = "off"  # what guesses tokens ahead, as `ClientConfig.speculation`
    draft_model: str = ""  # of speculation; what swarm_client opens, run on this machine
    draft_quantization: str = "nf4"  # how its large layers are held, as `ClientConfig.draft_quantization`
    host: str = "127.0.0.1"
    port: int = 5000
    http_threads: int = 48  # threads beyond those of the sockets, so that pages and probes are always answered
    database_url: str = ""  # sqlite:///FILE or postgresql://…; empty for a file in the user's data folder
    sockets: SocketLimits = field(default_factory=SocketLimits)
    generation: GenerationLimits = field(default_factory=GenerationLimits)
    security: SecurityConfig = field(default_factory=SecurityConfig)
    status: StatusConfig = field(default_factory=StatusConfig)
    operation: OperationConfig = field(default_factory=OperationConfig)
    limits: AddressLimits = field(default_factory=AddressLimits)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port {self.port} is not between 0 and 65535")
        if self.sockets.ws_max < 1 or self.http_threads < 4:
            raise ConfigError(
                f"at least 1 socket and 4 threads for HTTP are needed, got ws_max={self.sockets.ws_max} "
                f"and http_threads={self.http_threads}"
            )
        if self.generation.running_max < 1:
            raise ConfigError("running_max is 0; at least 1 generation has to run")
        check_choice(self.wire_dtype)
        if check_speculation(self.speculation) == "draft" and not self.draft_model:
            raise ConfigError("speculation is draft, but no draft_model is set")
        check_draft_quantization(self.draft_quantization)
        if self.operation.log_format not in ("text", "json"):
            raise ConfigError(f"log_format {self.operation.log_format!r} is neither text nor json")
        if not 0 <= self.operation.health_port <= 65535:
            raise ConfigError(f"health_port {self.operation.health_port} is not between 0 and 65535")


_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off", ""}


def _parse(name: str, text: str, default: object) -> object:
    """Return `text` as a value of the type of `default`."""
    try:
        match default:
            case bool():
                lowered = text.strip().lower()
                if lowered not in _TRUE | _FALSE:
                    raise ValueError
                return lowered in _TRUE
            case int():
                return int(text)
            case float():
                return float(text)
            case tuple():
                return tuple(text.replace(",", " ").split())
            case _:
                return text.strip()
    except ValueError:
        raise ConfigError(f"{name}={text!r} is not a value of type {type(default).__name__}") from None


def _from_env(config: T, env: Mapping[str, str]) -> T:
    changes: dict[str, Any] = {}
    for part in fields(config):  # type: ignore[arg-type]
        default = getattr(config, part.name)
        name = "PORT" if part.name == "port" else f"UMBEL_{part.name.upper()}"
        if is_dataclass(default) and not isinstance(default, type):
            changes[part.name] = _from_env(default, env)
        elif name in env:
            changes[part.name] = _parse(name, env[name], default)
    return replace(config, **changes)  # type: ignore[type-var]


def config_from_env(env: Mapping[str, str]) -> SiteConfig:
    """Return the defaults, changed by what `env` names. Raises ConfigError for a value that cannot be read."""
    return _from_env(SiteConfig(), env)


def environment_config() -> SiteConfig:
    """Return the configuration that this process's environment gives."""
    return config_from_env(os.environ)
