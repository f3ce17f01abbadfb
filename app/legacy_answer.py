"""Pure: an answer cut into the replies of protocol 2, with its stop sequences.

The predecessor ran `generate` again and again with `max_new_tokens` tokens each, until the whole text ended with a
stop sequence. Its clients see the same from here, but for three defects that are mended without changing a frame:

* a stop sequence in the middle of a piece counts: the answer is cut behind it, and so is the session;
* the stop sequence may have any number of tokens, special ones not counted;
* the model's own end of a turn ends the answer, instead of being generated past.

Rules: `outputs` include the stop text. Replies hold at least `reply_tokens` tokens, more while their text is held
back by the detokenizer. When an extra stop sequence ends the answer, the session's last token gives way to the stop
sequence, which is what clients believe to be there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from app.chat_protocol import LegacyReply
from swarm_client.generation.text_session import TextDelta


@dataclass(frozen=True, slots=True)
class StopRules:
    """What ends an answer. `stop_ids` are the tokens of `stop`; all may be empty, when one reply is wanted."""

    stop: str | None
    extra: tuple[str, ...]
    stop_ids: tuple[int, ...]
    encode: Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class TailChange:
    """The session's last `num_tokens` tokens are to be replaced."""

    num_tokens: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """What follows from a piece: a reply or none yet, and a change of the session when the answer ended in a stop."""

    reply: LegacyReply | None = None
    tail: TailChange | None = None

    @property
    def is_end(self) -> bool:
        """Whether the answer ended with this step."""
        return self.reply is not None and self.reply.stop


@dataclass(slots=True)
class LegacyAnswer:
    """Collects the pieces of one answer; `reply_tokens` None means one reply at the very end."""

    rules: StopRules
    reply_tokens: int | None
    _sent: str = ""  # the end of what was sent, as long as a stop sequence may begin in it
    _text: str = ""
    _num_tokens: int = 0
    _group: list[int] = field(default_factory=list)  # tokens behind the text of the latest piece that had any

    def feed(self, delta: TextDelta) -> Step:
        """Take the next piece of the answer."""
        text, ended = delta.text, delta.finish_reason == "stop"
        if ended and self.rules.stop and self._ends_with_stop_token(delta) and not text.endswith(self.rules.stop):
            text += self.rules.stop  # special tokens have no text of their own in a delta
        self._group.extend(delta.token_ids)
        self._num_tokens += len(delta.token_ids)
        self._text += text
        cut = self._find_stop()
        if cut is not None:
            end, is_extra = cut
            tail = self._tail_change(text, surplus=len(self._text) - end, is_extra=is_extra)
            return Step(self._reply(end, stop=True), tail)
        if ended or (delta.finish_reason is not None and self.reply_tokens is None):
            return Step(self._reply(len(self._text), stop=True))
        if text:
            self._group.clear()
        if self._text and self.reply_tokens is not None and self._num_tokens >= self.reply_tokens:
            return Step(self._reply(len(self._text), stop=False))
        return Step()

    def finish(self) -> LegacyReply:
        """Return the last reply when the answer ended without a stop, at the length that was asked for."""
        return self._reply(len(self._text), stop=True)

    def _ends_with_stop_token(self, delta: TextDelta) -> bool:
        return len(self.rules.stop_ids) == 1 and delta.token_ids[-1:] == self.rules.stop_ids

    def _find_stop(self) -> tuple[int, bool] | None:
        """Return where in the unsent text the first stop ends, and whether it is an extra one."""
        text, known = self._sent + self._text, len(self._sent)
        best: tuple[int, bool] | None = None
        for index, stop in enumerate((self.rules.stop, *self.rules.extra)):
            if not stop:
                continue
            found = text.find(stop, max(0, known - len(stop) + 1))
            end = found + len(stop) - known
            if found >= 0 and (best is None or end < best[0]):
                best = (end, index > 0)
        return best

    def _tail_change(self, last_text: str, *, surplus: int, is_extra: bool) -> TailChange | None:
        if not surplus and not is_extra:
            return None
        kept = list(self._group)
        if surplus:
            kept = list(self.rules.encode(last_text[: max(0, len(last_text) - surplus)]))
        if is_extra:
            kept = [*kept[:-1], *self.rules.stop_ids]
        return TailChange(len(self._group), tuple(kept))

    def _reply(self, end: int, *, stop: bool) -> LegacyReply:
        outputs, num_tokens = self._text[:end], self._num_tokens
        longest = max((len(text) for text in (self.rules.stop or "", *self.rules.extra)), default=0)
        self._sent = (self._sent + outputs)[-longest:] if longest else ""
        self._text, self._num_tokens = "", 0
        return LegacyReply(outputs, stop, num_tokens)
