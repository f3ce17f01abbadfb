"""Pure: find stop strings in a stream of text without ever showing the beginning of one."""

from collections.abc import Sequence


class StopScanner:
    """Text in, text out, up to the first stop string; what might become one is held back."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(s for s in stop if s)
        self._held = ""
        self.is_stopped = False

    def feed(self, text: str) -> str:
        """Return the text that can be shown now. Sets `is_stopped` at the first stop string and then gives no more."""
        if self.is_stopped:
            return ""
        self._held += text
        found = [index for s in self._stop if (index := self._held.find(s)) >= 0]
        if found:
            self.is_stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown

    def flush(self) -> str:
        """Return what was held back; for an answer that ended without a stop string."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
