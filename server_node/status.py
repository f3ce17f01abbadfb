"""Pure: what a node tells its owner: on the terminal, over its local socket, and as metrics."""

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

STATES = ("opening", "paused", "loading", "joining", "online", "draining")
"""In their order: the model is opened and the swarm joined; the node waits for its owner's programs to leave the device
alone; blocks are loaded; others try the node out; it serves; it leaves, or goes on to load other blocks, or to wait."""

RECENT_S = 10.0
"""Over which tokens are counted as the present rate: long enough for a slow model's steps to be several."""


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """What is so now. None, or nothing, stands for what is not known yet; numbers of work count from the start."""

    state: str
    model: str
    software: str
    uptime_s: float
    peer_id: str | None = None
    addresses: tuple[str, ...] = ()
    blocks: str | None = None
    loaded_blocks: int = 0
    blocks_to_load: int = 0
    num_sessions: int = 0
    num_peers: int = 0
    """Peers that have a stream open here."""
    tokens_per_s: float = 0.0
    """Computed for sessions in the last `RECENT_S` seconds, each token once however many blocks it went through."""
    cache_tokens: int = 0
    cache_used_tokens: int = 0
    """Of `cache_tokens`: what sessions have reserved."""
    memory_bytes: int | None = None
    """Of this machine's memory, resident; without the network daemon, and without that of a GPU."""
    num_steps: int = 0
    num_tokens: int = 0
    queue_s: float = 0.0
    """That steps have waited, in all."""
    decode_steps_per_s: Mapping[str, float] = field(default_factory=dict)
    """Of the span as it was measured before it served, by the rows of a step."""
    prompt_tokens_per_s: float | None = None
    """Measured likewise."""
    uplink_bytes_per_s: float | None = None
    """To other peers, measured."""
    errors: Mapping[str, int] = field(default_factory=dict)
    """Steps and openings that were refused or failed, by the code of the error."""

    def as_json(self) -> dict[str, Any]:
        """Return all of it as JSON has it."""
        return asdict(self)

    @property
    def exit_status(self) -> int:
        """Of `umbel-node status`."""
        return 0 if self.state == "online" else 1


def status_from(values: object) -> NodeStatus:
    """Return what `as_json` made these values of, by a node of the same version. Raises ValueError."""
    if not isinstance(values, dict):
        raise ValueError("no status")
    try:
        return NodeStatus(**{**values, "addresses": tuple(values.get("addresses", ()))})
    except TypeError as error:
        raise ValueError(f"the status of another version: {error}") from None


class ServedWork:
    """Counts what was computed for sessions. Belongs to the event loop."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.num_tokens = 0
        self.queue_s = 0.0
        self.errors: Counter[str] = Counter()
        self._by_second: deque[tuple[int, int]] = deque(maxlen=int(RECENT_S) + 1)

    def computed(self, num_tokens: int, queue_s: float, now_s: float) -> None:
        """Count a step of `num_tokens`, rows times columns, that has just been computed."""
        self.num_steps += 1
        self.num_tokens += num_tokens
        self.queue_s += queue_s
        second = int(now_s)
        if self._by_second and self._by_second[-1][0] == second:
            num_tokens += self._by_second.pop()[1]
        self._by_second.append((second, num_tokens))

    def failed(self, code: str) -> None:
        """Count what was refused or went wrong."""
        self.errors[code] += 1

    def tokens_per_s(self, now_s: float) -> float:
        """Return the rate of the last `RECENT_S` seconds."""
        return sum(tokens for second, tokens in self._by_second if second > now_s - RECENT_S) / RECENT_S


def state_words(status: NodeStatus) -> str:
    """Return the state as people read it."""
    if status.state == "loading" and status.blocks_to_load:
        return f"loading {status.loaded_blocks} of {status.blocks_to_load} blocks"
    return status.state


def status_line(status: NodeStatus) -> str:
    """Return the facts that change, in one line."""
    parts = [status.model, state_words(status)]
    if status.blocks is not None:
        parts[1:1] = [f"blocks {status.blocks}"]
    if status.cache_tokens:
        used_percent = round(100 * status.cache_used_tokens / status.cache_tokens)
        parts += [
            _counted(status.num_sessions, "session"),
            f"{status.tokens_per_s:.1f} tokens/s",
            f"cache {used_percent} %",
            _counted(status.num_peers, "peer"),
        ]
    return " | ".join(parts)


def status_table(status: NodeStatus) -> str:
    """Return all facts for people, a line each."""
    rows = [
        ("state", state_words(status)),
        ("model", status.model),
        ("blocks", status.blocks or "not chosen yet"),
        ("peer id", status.peer_id or "not joined yet"),
        *(("address", address) for address in status.addresses),
        ("sessions", str(status.num_sessions)),
        ("peers", str(status.num_peers)),
        ("speed", f"{status.tokens_per_s:.1f} tokens/s in the last {RECENT_S:g} s"),
        ("measured", _measured(status)),
        ("uplink", "unknown" if status.uplink_bytes_per_s is None else f"{status.uplink_bytes_per_s / 1e6:.2f} MB/s"),
        ("served", f"{status.num_tokens} tokens in {status.num_steps} steps"),
        ("cache", f"{status.cache_used_tokens} of {status.cache_tokens} tokens"),
        ("errors", ", ".join(f"{count} {code}" for code, count in sorted(status.errors.items())) or "none"),
        ("memory", "unknown" if status.memory_bytes is None else f"{status.memory_bytes / 1e9:.2f} GB"),
        ("up for", _duration(status.uptime_s)),
        ("software", status.software),
    ]
    return "\n".join(f"{name:<9} {value}" for name, value in rows)


def _measured(status: NodeStatus) -> str:
    steps = [f"{rate:.1f} steps/s of {rows}" for rows, rate in status.decode_steps_per_s.items()]
    if steps:
        steps[-1] += " rows"
    if status.prompt_tokens_per_s is not None:
        steps.append(f"{status.prompt_tokens_per_s:.1f} tokens/s of prompts")
    return ", ".join(steps) or "unknown"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _duration(seconds: float) -> str:
    minutes, rest_s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest_s, "s")]
    return " ".join(f"{count} {unit}" for count, unit in parts if count) or "0 s"
