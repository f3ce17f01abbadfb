"""Pure: how a running node is, for its owner."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

REPORT_S = 2.0
"""Between two reports of a running node."""


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """What an owner may want to know. `tokens_per_s` are those of the last `REPORT_S`, prompts included."""

    state: str
    model: str
    blocks: str
    peer_id: str
    address: str
    sessions: int
    tokens_per_s: float
    cache_tokens: int
    free_tokens: int
    uptime_s: float
    software: str

    def as_json(self) -> dict[str, Any]:
        """Return the fields as a program reads them."""
        return asdict(self)


class TokenRate:
    """Makes tokens a second of a count that grows."""

    def __init__(self, now_s: float) -> None:
        self._last = (0, now_s)

    def at(self, count: int, now_s: float) -> float:
        """Return how fast `count` grew since the last call."""
        (before, before_s), self._last = self._last, (count, now_s)
        return (count - before) / (now_s - before_s) if now_s > before_s else 0.0


def lines(status: Mapping[str, Any], age_s: float) -> list[str]:
    """Return what people read of a status that is `age_s` old."""
    used = status["cache_tokens"] - status["free_tokens"]
    share = f" ({100 * used / status['cache_tokens']:.0f} %)" if status["cache_tokens"] else ""
    rows = [
        ("state", status["state"]),
        ("model", status["model"]),
        ("blocks", status["blocks"]),
        ("peer id", status["peer_id"]),
        ("address", status["address"]),
        ("open sessions", str(status["sessions"])),
        ("tokens/s", f"{status['tokens_per_s']:.1f}"),
        ("KV cache", f"{used:,} of {status['cache_tokens']:,} tokens reserved{share}"),
        ("up for", _duration(status["uptime_s"] + age_s)),
        ("software", status["software"]),
    ]
    if age_s > 5 * REPORT_S:
        rows.append(("last heard", f"{_duration(age_s)} ago: the node may be frozen"))
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {text}" for name, text in rows]


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours >= 48:
        return f"{hours // 24} days {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min" if minutes else f"{int(seconds)} s"
