"""Pure: how fast this node is, smoothed from its work, for its record."""

import math
from dataclasses import dataclass

from server_node.compute.work import Computed
from server_node.figures import Figures
from server_node.status import ServedWork
from swarm_protocol.records import Pings

MAX_SECONDS = 60.0
"""What a record may say at most; a node that is slower is of no use anyway."""

_WEIGHT = 0.1
"""Of a new measurement: half of what is said is from the last seven steps, so that a record outlives an odd one."""

_FEW_TOKENS = 4
"""Rows times columns of a step that take hardly longer than one."""

_MANY_TOKENS = 16
"""From so many on a step's time goes by its tokens."""

_QUEUE_HALF_S = 10.0
"""In which a wait that is not seen again counts half: the time between two records."""


@dataclass(frozen=True, slots=True)
class RoutingFacts:
    """What a node says of itself so that clients can choose; as the fields of `NodeRecord`."""

    block_step_s: float | None = None
    block_token_s: float | None = None
    queue_s: float = 0.0
    pings_s: Pings = ()
    uplink_bytes_per_s: int | None = None


class SpeedMeter:
    """Collects the times of steps. Belongs to the event loop."""

    def __init__(self, served: ServedWork | None = None) -> None:
        self.served = served or ServedWork()
        self.figures: Figures | None = None
        self.uplink_bytes_per_s: float | None = None
        self._block_step_s: float | None = None
        self._block_token_s: float | None = None
        self._queue_s = 0.0
        self._waited_s = 0.0

    def measured(self, figures: Figures) -> None:
        """Begin with what was measured of the blocks, before anybody used them."""
        self.figures = figures
        self._block_step_s = figures.decode_s[1]
        self._block_token_s = figures.block_token_s

    def ran(self, output: Computed, num_blocks: int, now_s: float) -> None:
        """Count a session's step through `num_blocks` blocks that has just been computed.

        A step that shared its forwards with others took what that took: it is what a step costs here now.
        """
        tokens = output.hidden_states.shape[0] * output.hidden_states.shape[1]
        if 0 < tokens <= _FEW_TOKENS:
            self._block_step_s = _smoothed(self._block_step_s, output.compute_s / num_blocks)
            # A prefill waits for others in between its chunks; decode steps are what queues are felt by.
            self._queue_s = _smoothed(self._decayed_queue_s(now_s), output.queue_s)
            self._waited_s = now_s
        elif tokens >= _MANY_TOKENS:
            self._block_token_s = _smoothed(self._block_token_s, output.compute_s / num_blocks / tokens)

    def facts(self, pings_s: Pings, now_s: float) -> RoutingFacts:
        """Return what the record is to say."""
        return RoutingFacts(
            _published(self._block_step_s),
            _published(self._block_token_s),
            _published(self._decayed_queue_s(now_s)) or 0.0,
            pings_s,
            None if self.uplink_bytes_per_s is None else round(self.uplink_bytes_per_s),
        )

    def _decayed_queue_s(self, now_s: float) -> float:
        return self._queue_s * math.exp2(-max(0.0, now_s - self._waited_s) / _QUEUE_HALF_S)


def _smoothed(known: float | None, value: float) -> float:
    return value if known is None else known + _WEIGHT * (value - known)


def _published(seconds: float | None) -> float | None:
    return None if seconds is None else round(min(seconds, MAX_SECONDS), 9)
