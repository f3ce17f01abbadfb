"""What a site does now and then with its database and the like, so that no request waits for it.

Each chore has a thread of its own: one that hangs, with the server that it speaks to, holds up no other.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Chore:
    """Something that is done every `period_s`."""

    name: str
    do: Callable[[], None]
    period_s: float


class Keeper:
    """By itself goes on until the process ends: bans hold for those whose answers are let end, too."""

    def __init__(self, chores: Sequence[Chore], is_ending: Callable[[], bool] = lambda: False) -> None:
        self._chores, self._is_ending = chores, is_ending

    def start(self) -> None:
        """Begin. Called once."""
        for chore in self._chores:
            threading.Thread(target=self._run, args=(chore,), name=f"keeper-{chore.name}", daemon=True).start()

    def _run(self, chore: Chore) -> None:
        while not self._is_ending():
            time.sleep(chore.period_s)
            try:
                chore.do()
            except Exception:  # the outermost loop of the thread
                logger.exception("bug in the keeper: %s", chore.name)
