"""Pure: whose fault an error of a step is, whether its session can stay where it is, and how long it waits if not."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from swarm_client.events import LOOKING, RouteReason, Waiting
from swarm_protocol.errors import (
    CacheFullError,
    InternalError,
    InvalidTensorError,
    LimitExceededError,
    MissingBlocksError,
    NodeDrainingError,
    ProtocolError,
    SessionClosedError,
    SessionNotFoundError,
    SwarmError,
)
from swarm_protocol.spans import Span

MAX_WRONG_ANSWERS = 3
"""In one step: so many nodes that answer wrongly one after the other mean that it is not the nodes."""


class Fault(Enum):
    """Who is to blame for a step that failed at a hop."""

    CALLER = "caller"
    """The step itself is at fault: every node would refuse it."""

    NODE = "node"
    """The hop's node is gone, full, leaving, or answers wrongly: another one may do better."""

    NODE_BEFORE = "node_before"
    """The node of the hop before, whose output was refused with reason."""


def fault_of(error: SwarmError, *, is_first_hop: bool, is_input_finite: bool) -> Fault:
    """Return who is to blame for `error`, which came up when a hop was given its input."""
    if isinstance(error, InvalidTensorError) and not is_input_finite:
        return Fault.CALLER if is_first_hop else Fault.NODE_BEFORE
    # A node closes a session that was idle for long; what it held can be computed again.
    is_nodes = error.retryable or isinstance(error, ProtocolError | SessionClosedError)
    return Fault.NODE if is_nodes else Fault.CALLER


def stays_usable(error: SwarmError) -> bool:
    """Whether the session goes on at its node if no other one takes it: the step was refused, nothing is lost."""
    return isinstance(error, CacheFullError | LimitExceededError | NodeDrainingError)


def has_forgotten(error: SwarmError) -> bool:
    """Whether the node is well but has the session no more: it was restarted, or the session was idle for too long."""
    return isinstance(error, SessionClosedError | SessionNotFoundError)


def is_wrong_answer(error: SwarmError) -> bool:
    """Whether the node is there but does the wrong thing, so that waiting for it is of no use."""
    return isinstance(error, ProtocolError | InternalError)


def reason_of(error: SwarmError) -> RouteReason:
    """Return why the blocks of a node that answered with `error` go elsewhere."""
    match error:
        case NodeDrainingError():
            return "node_leaving"
        case CacheFullError() | LimitExceededError():
            return "node_full"
        case SessionClosedError() | SessionNotFoundError():
            return "session_forgotten"
        case ProtocolError() | InternalError():
            return "wrong_answer"
        case _:
            return "node_lost"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long blocks that have no node are waited for, from `since_s` on."""

    since_s: float
    max_wait_s: float

    def lasts(self, until_s: float) -> bool:
        """Whether a try at `until_s` still counts."""
        return until_s <= self.since_s + self.max_wait_s

    def waiting(self, spans: Sequence[Span], cause: SwarmError | None, now_s: float) -> Waiting:
        """Return what to tell at `now_s`: `cause` is what the last try ended with, None before the first."""
        named = cause.missing if isinstance(cause, MissingBlocksError) else ()
        waited_s = now_s - self.since_s
        left_s = max(0.0, self.max_wait_s - waited_s)
        return Waiting(tuple(named or spans), LOOKING if cause is None else cause.code, waited_s, left_s)
