"""Pure: token ids to text, piece by piece, never ending inside a character."""

from collections.abc import Callable, Sequence

MAX_HELD_TOKENS = 8
"""A character has at most four bytes, and a token at least one: whatever is still broken then is broken for good."""

_BROKEN = "\ufffd"


class Detokenizer:
    """Turns a growing list of token ids into text deltas.

    What a token adds depends on its neighbours (spaces of SentencePiece, bytes of a character), so the text of a token
    is what the decoded window grows by when it is added (the method of text-generation-inference).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()) -> None:
        """`context` are ids before the first one, whose text is out already; the last few are enough."""
        self._decode = decode
        self._window = list(context[-MAX_HELD_TOKENS:])
        self._shown = len(self._window)

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes; empty while a character is unfinished."""
        self._window.append(token_id)
        text = self._unshown()
        if not text:
            # It adds nothing of its own: not counted as a part of what is held, but what comes may depend on it.
            self._window = self._window[-MAX_HELD_TOKENS:]
            self._shown = len(self._window)
            return ""
        if text.endswith(_BROKEN) and len(self._window) - self._shown < MAX_HELD_TOKENS:
            return ""
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return text

    def flush(self) -> str:
        """Return what is held, complete or not; for the end of an answer."""
        text = self._unshown()
        self._shown = len(self._window)
        return text

    def _unshown(self) -> str:
        before = self._decode(self._window[: self._shown])
        return self._decode(self._window)[len(before) :]
