"""Pure: how much a client may ask for, hold and leave unread."""

from collections.abc import Collection
from enum import Enum

from app.config import GenerationLimits, SocketLimits
from app.errors import BannedError, InvalidKeyError
from swarm_protocol.errors import MaxLengthError


class CloseCode(int, Enum):
    """Why the site closes a websocket. Below 4000 they are RFC 6455's, above the site's own."""

    NORMAL = 1000
    FLOOD = 1008
    TOO_BIG = 1009
    RESTART = 1012
    KEY = 4401
    ORIGIN = 4403
    IDLE = 4408
    TAKEN_OVER = 4409
    BANNED = 4410
    TOO_MANY = 4429


SHUT_OUT_CLOSES: dict[type[Exception], tuple[CloseCode, str]] = {
    BannedError: (CloseCode.BANNED, "closed to you"),
    InvalidKeyError: (CloseCode.KEY, "the key is not in use"),
}
"""How a socket ends whose client was shut out."""

FLOOD_WINDOW_S = 10.0  # in which a client of protocol 3 may send as many frames as may wait


class FrameRate:
    """Counts the frames of one client, whose answers may come faster than it could fill a queue."""

    def __init__(self, limits: SocketLimits) -> None:
        self._most = limits.max_queued_frames
        self._since_s = float("-inf")
        self._count = 0

    def is_flood(self, now_s: float) -> bool:
        """Count a frame; return whether that was one too many."""
        if now_s - self._since_s >= FLOOD_WINDOW_S:
            self._since_s, self._count = now_s, 0
        self._count += 1
        return self._count > self._most


def is_flood(queued: Collection[str | bytes], limits: SocketLimits) -> bool:
    """Return whether a client sent more, without waiting for answers, than it may."""
    return len(queued) > limits.max_queued_frames or sum(map(len, queued)) > limits.max_queued_bytes


def is_expired(last_used_s: float, now_s: float, limits: SocketLimits) -> bool:
    """Return whether nothing was generated on a socket for too long."""
    return now_s - last_used_s >= limits.idle_s


def session_length(asked: int | None, model_max: int, limits: GenerationLimits) -> int:
    """Return the length to open a session for: what was asked for, within the model's and the site's limits.

    A request beyond the limits gets the limit, since clients grow their sessions until the error says no.
    """
    most = min(model_max, limits.session_max_length)
    return most if asked is None else max(1, min(asked, most))


def answer_length(asked: int | None, position: int, max_length: int, limits: GenerationLimits) -> int:
    """Return how many tokens an answer may have: what was asked for, within the site's limit and what is left.

    Raises MaxLengthError when nothing is left.
    """
    left = max_length - position
    if left < 1:
        raise MaxLengthError(position, 1, max_length)
    wanted = limits.max_new_tokens if asked is None else min(asked, limits.max_new_tokens)
    return max(1, min(wanted, left))


def tokens_per_s(num_tokens: int, start_s: float, end_s: float) -> float | None:
    """Return the speed of `num_tokens` that arrived between two moments; None if it cannot be told."""
    if num_tokens < 1 or end_s <= start_s:
        return None
    return num_tokens / (end_s - start_s)
