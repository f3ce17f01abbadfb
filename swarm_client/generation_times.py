"""Pure: where the time of a generation went: queue, compute and wire of every hop, the client, and recoveries.

A step's time is that of its hops, what recovering took, and a rest that the client needed for it. Pieces of a prompt
run at several hops at once: their times are shares of the step's then, so that everything always adds up to what the
clock said. What the caller does between two tokens of a text is nobody's and does not count.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from swarm_protocol.ids import PeerId, short_peer
from swarm_protocol.spans import Span, describe_blocks


@dataclass(frozen=True, slots=True)
class TimeShares:
    """Seconds by what they were spent on.

    queue    steps waited in nodes for the device
    compute  blocks ran
    wire     the rest of the hops: the network, both sides' byte handling
    client   embedding, final norm, head and sampling, and what handing a step over takes
    stall    steps that failed, looking for other nodes, and what these computed again
    """

    queue_s: float = 0.0
    compute_s: float = 0.0
    wire_s: float = 0.0
    client_s: float = 0.0
    stall_s: float = 0.0

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.queue_s + self.compute_s + self.wire_s + self.client_s + self.stall_s

    def as_json(self) -> dict[str, float]:
        """Return the shares and their sum, to the microsecond."""
        return {name: round(value, 6) for name, value in {**asdict(self), "total_s": self.total_s}.items()}


SHARES = tuple(field.name for field in fields(TimeShares))


@dataclass(frozen=True, slots=True)
class HopTimes:
    """One hop of the route: `num_steps` that went through it, the times of all of them and the median of a token."""

    span: Span
    peer_id: PeerId
    num_steps: int
    total: TimeShares
    per_token: TimeShares

    def as_json(self) -> dict[str, Any]:
        """Return the fields as the APIs show them."""
        return {
            "blocks": str(self.span),
            "peer": short_peer(self.peer_id),
            "steps": self.num_steps,
            "total": _hop_json(self.total),
            "per_token": _hop_json(self.per_token),
        }


@dataclass(frozen=True, slots=True)
class GenerationTimes:
    """The report on one generation.

    `num_tokens` are the tokens that steps ended in; `first_token` is the first of them, with the prompt, `per_token`
    the medians of the steps behind it that nothing disturbed, part by part, over the tokens that such a step brought.
    `recomputed_tokens` were computed again in `num_recoveries` recoveries. Of `drafted_tokens`, which were guessed
    ahead, `accepted_tokens` were right; the last few of these may not have been wanted any more.
    """

    num_tokens: int
    total: TimeShares
    first_token: TimeShares
    per_token: TimeShares
    hops: tuple[HopTimes, ...]
    num_recoveries: int = 0
    recomputed_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return the report as an object for `json.dumps`; times are seconds."""
        return {
            "tokens": self.num_tokens,
            "total": self.total.as_json(),
            "first_token": self.first_token.as_json(),
            "per_token": self.per_token.as_json(),
            "hops": [hop.as_json() for hop in self.hops],
            "recoveries": self.num_recoveries,
            "recomputed_tokens": self.recomputed_tokens,
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
        }

    def as_table(self) -> str:
        """Return the report as Markdown tables, in milliseconds."""
        head = ("ms", "first token", "per token, median", "all")
        columns = (self.first_token, self.per_token, self.total)
        rows = [(name.removesuffix("_s"), *(_ms(getattr(column, name)) for column in columns)) for name in SHARES]
        rows.append(("all", *(_ms(column.total_s) for column in columns)))
        hop_head = ("hop, ms per token", "queue", "compute", "wire")
        hop_rows = [
            (
                f"{describe_blocks(hop.span)} at {short_peer(hop.peer_id)}",
                *(_ms(seconds) for seconds in (hop.per_token.queue_s, hop.per_token.compute_s, hop.per_token.wire_s)),
            )
            for hop in self.hops
        ]
        parts = [self._summary(), _table(head, rows)]
        return "\n\n".join(parts + ([_table(hop_head, hop_rows)] if hop_rows else []))

    def _summary(self) -> str:
        parts = [f"{self.num_tokens} token{'' if self.num_tokens == 1 else 's'} in {self.total.total_s:.2f} s"]
        if self.per_token.total_s:
            parts.append(f"{1 / self.per_token.total_s:.1f} tokens/s")
        if self.drafted_tokens:
            parts.append(f"{self.accepted_tokens} of {self.drafted_tokens} guessed tokens were right")
        if self.num_recoveries:
            times = "once" if self.num_recoveries == 1 else f"{self.num_recoveries} times"
            parts.append(f"recovered {times}, {self.recomputed_tokens} tokens computed again")
        return "; ".join(parts)


def _hop_json(shares: TimeShares) -> dict[str, float]:
    found = shares.as_json()
    return {name: found[name] for name in ("queue_s", "compute_s", "wire_s")}


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table that is readable as text: names at the left, numbers at the right."""
    widths = [max(len(row[index]) for row in (head, *rows)) for index in range(len(head))]
    rule = ["-" * width if index == 0 else "-" * (width - 1) + ":" for index, width in enumerate(widths)]
    padded = [[_padded(index, cell, widths[index]) for index, cell in enumerate(row)] for row in (head, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:]))


def _padded(index: int, cell: str, width: int) -> str:
    return cell.rjust(width) if index else cell.ljust(width)
