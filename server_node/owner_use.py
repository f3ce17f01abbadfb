"""Pure: whether the owner's own programs use the device, from how much of it they used lately.

They are there once they have used a good part of it for a while, and away once they have used next to nothing for a
longer while: a node that drained and loaded for every web page that is opened would serve nobody.
"""

BUSY_SHARE = 0.25
"""Of the device: what a game or a training run uses, and a desktop does not."""

IDLE_SHARE = 0.10

BUSY_FOR_S = 10.0
"""Until somebody is taken to be there."""

IDLE_FOR_S = 120.0
"""Until nobody is any more: a player looks at a menu, a program compiles between two runs."""


class OwnerUse:
    """Takes samples and says whether somebody is there; None until that is known, which takes `BUSY_FOR_S`."""

    def __init__(self) -> None:
        self.is_there: bool | None = None
        self._busy_since_s: float | None = None
        self._idle_since_s: float | None = None

    def sampled(self, share: float, now_s: float) -> None:
        """Count that others used `share` of the device, 0 to 1, from the sample before until `now_s`."""
        self._busy_since_s = _since(self._busy_since_s, now_s) if share >= BUSY_SHARE else None
        self._idle_since_s = _since(self._idle_since_s, now_s) if share < BUSY_SHARE else None
        if self.is_there and share >= IDLE_SHARE:
            self._idle_since_s = None
        if self._busy_since_s is not None and now_s - self._busy_since_s >= BUSY_FOR_S:
            self.is_there = True
        idle_for_s = BUSY_FOR_S if self.is_there is None else IDLE_FOR_S
        if self._idle_since_s is not None and now_s - self._idle_since_s >= idle_for_s:
            self.is_there = False


def _since(begun_s: float | None, now_s: float) -> float:
    return now_s if begun_s is None else begun_s
