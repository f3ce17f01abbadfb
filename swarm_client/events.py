"""Pure: what a session tells while it runs: its route changed, it waits for blocks, it goes on again.

    opened ── route_changed(opened)
    a prompt of several pieces ── prefilled after each but the last
    a node fails ── waiting(looking) ── waiting(why nobody could take over) each second …
        … until others did ── route_changed(why) ── recovered
        … or the time is over: the step ends with the error

Programs go by the fields. `message` is a sentence for people, and may change.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from swarm_protocol.ids import PeerId, short_peer
from swarm_protocol.spans import Span, describe_blocks

RouteReason = Literal["opened", "node_lost", "node_leaving", "node_full", "wrong_answer", "session_forgotten"]
"""Why blocks went elsewhere; `opened` is a session's first route."""

LOOKING = "looking"
NO_ANSWER = "no_answer"


@dataclass(frozen=True, slots=True)
class RoutePart:
    """The blocks that one node runs."""

    span: Span
    peer_id: PeerId

    def as_json(self) -> dict[str, Any]:
        """Return it as the APIs show it: blocks as in flags and logs, and enough of the peer id to tell nodes apart."""
        return {"blocks": str(self.span), "peer": short_peer(self.peer_id)}


@dataclass(frozen=True, slots=True)
class RouteChanged:
    """The blocks of `left` are run by `joined` now; `route` is the whole route since then, in the order of blocks."""

    kind: ClassVar[str] = "route_changed"

    reason: RouteReason
    left: tuple[RoutePart, ...]
    joined: tuple[RoutePart, ...]
    route: tuple[RoutePart, ...]

    @property
    def message(self) -> str:
        """The sentence for people."""
        now = ", ".join(f"{describe_blocks(part.span)} at {short_peer(part.peer_id)}" for part in self.joined)
        if self.reason == "opened":
            return f"the route is {now}"
        return f"{_blocks([part.span for part in self.left])} went elsewhere ({self.reason}): {now}"

    def as_json(self) -> dict[str, Any]:
        """Return the fields as the APIs show them."""
        parts = {"left": self.left, "joined": self.joined, "route": self.route}
        shown = {name: [part.as_json() for part in found] for name, found in parts.items()}
        return {"reason": self.reason, **shown, "message": self.message}


@dataclass(frozen=True, slots=True)
class Waiting:
    """No node runs `spans` for this session now.

    `cause` is `looking` while nodes that could are being asked, `no_answer` while the only node that has them is
    silent, else the code of the error that the last try ended with: `missing_blocks` where nobody serves them.
    `left_s` is how long it will wait from now on, None where that is not known.
    """

    kind: ClassVar[str] = "waiting"

    spans: tuple[Span, ...]
    cause: str
    waited_s: float
    left_s: float | None

    @property
    def message(self) -> str:
        """The sentence for people, which names blocks inclusively: `blocks 12–15 have no node`."""
        blocks = _blocks(self.spans)
        is_one = len(self.spans) == 1 and len(self.spans[0]) == 1
        match self.cause:
            case "looking":
                return f"looking for another node for {blocks}"
            case "no_answer":
                return f"the only node of {blocks} does not answer"
            case "missing_blocks":
                what = f"{blocks} {'has' if is_one else 'have'} no node"
            case _:
                what = f"no node can take {blocks} now ({self.cause})"
        return what if self.left_s is None else f"{what}; waiting {self.left_s:.0f} s more"

    def as_json(self) -> dict[str, Any]:
        """Return the fields as the APIs show them."""
        return {
            "blocks": [str(span) for span in self.spans],
            "cause": self.cause,
            "waited_s": round(self.waited_s, 1),
            "left_s": None if self.left_s is None else round(self.left_s, 1),
            "message": self.message,
        }


@dataclass(frozen=True, slots=True)
class Recovered:
    """The session goes on after `stall_s`; `num_tokens` were computed again at the nodes that took over."""

    kind: ClassVar[str] = "recovered"

    stall_s: float
    num_tokens: int

    @property
    def message(self) -> str:
        """The sentence for people."""
        return f"going on after {self.stall_s:.1f} s; {self.num_tokens} tokens were computed again"

    def as_json(self) -> dict[str, Any]:
        """Return the fields as the APIs show them."""
        return {"stall_s": round(self.stall_s, 3), "tokens": self.num_tokens, "message": self.message}


@dataclass(frozen=True, slots=True)
class Prefilled:
    """`done` of the `total` tokens of a prompt are cached; told after each piece of a long one but the last."""

    kind: ClassVar[str] = "prefilled"

    done: int
    total: int

    @property
    def message(self) -> str:
        """The sentence for people."""
        return f"{self.done} of {self.total} tokens of the prompt are computed"

    def as_json(self) -> dict[str, Any]:
        """Return the fields as the APIs show them."""
        return {"prefill_done": self.done, "prefill_total": self.total}


SessionEvent = RouteChanged | Waiting | Recovered | Prefilled
EventListener = Callable[[SessionEvent], None]


def _blocks(spans: Sequence[Span]) -> str:
    return ", ".join(describe_blocks(span) for span in spans)
