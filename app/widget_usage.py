"""What the chats of each widget key used, held against the key's limits. In memory: a restart begins to count anew."""

import threading
import time
from collections import deque
from dataclasses import dataclass, field

from app.widget_keys import WidgetKey
from swarm_protocol.errors import LimitExceededError

MINUTE_S, DAY_S = 60.0, 86400


@dataclass(slots=True)
class _Used:
    asked_s: deque[float] = field(default_factory=deque)  # of the last minute, no more than its key allows
    day: int = 0
    tokens: int = 0


class WidgetUsage:
    """Counts questions and tokens by key. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used: dict[str, _Used] = {}

    def ask(self, key: WidgetKey) -> None:
        """Count a question. Raises LimitExceededError where the key allows none now."""
        now_s = time.time()
        with self._lock:
            used = self._of(key.key, now_s)
            if key.tokens_per_day is not None and used.tokens >= key.tokens_per_day:
                raise LimitExceededError(
                    f"this chat has used up its {key.tokens_per_day} tokens of today; come back tomorrow"
                )
            if key.requests_per_minute is None:
                return
            while used.asked_s and used.asked_s[0] <= now_s - MINUTE_S:
                used.asked_s.popleft()
            if len(used.asked_s) >= key.requests_per_minute:
                raise LimitExceededError(
                    f"this chat takes {key.requests_per_minute} questions a minute; try again soon"
                )
            used.asked_s.append(now_s)

    def left(self, key: WidgetKey) -> int | None:
        """Return how many tokens may be answered today; None for any number."""
        if key.tokens_per_day is None:
            return None
        with self._lock:
            return max(0, key.tokens_per_day - self._of(key.key, time.time()).tokens)

    def count_tokens(self, key: str, num_tokens: int) -> None:
        """Count tokens of an answer, complete or not."""
        with self._lock:
            self._of(key, time.time()).tokens += num_tokens

    def _of(self, key: str, now_s: float) -> _Used:
        used = self._used.setdefault(key, _Used())
        day = int(now_s // DAY_S)
        if used.day != day:
            used.day, used.tokens = day, 0
        return used
