"""A scripted model behind the interfaces of `text_session`: its tokens are words, and every call is counted."""

import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from swarm_client.events import EventListener, Recovered, RouteChanged, RoutePart, SessionEvent, Waiting
from swarm_client.generation.text_session import ChatMessage, FinishReason, SamplingParams, TextDelta, TokenLogprobs
from swarm_client.generation_times import GenerationTimes, HopTimes, TimeShares
from swarm_client.model_swarm import BlockSize, ModelSwarm, SeenNode
from swarm_protocol.errors import (
    CacheFullError,
    CancelledStepError,
    InvalidRequestError,
    MaxLengthError,
    MissingBlocksError,
    StreamLostError,
    SwarmError,
)
from swarm_protocol.ids import PeerId
from swarm_protocol.spans import Span
from tests.app.markdown_answers import ARABIC, HOSTILE, RICH, huge
from tests.app.swarms import NUM_BLOCKS, complete

EOS = "</s>"
SIZE = BlockSize("bfloat16", 500_000_000, 160_000_000)
PIECES = re.compile(r"</s>|<(?:user|assistant|system)>|\s*[^\s<]+|\s+|<")


@dataclass
class Counts:
    """What happened to a model's sessions, over all of them."""

    opened: int = 0
    closed: int = 0
    appended_tokens: int = 0
    generated_tokens: int = 0
    cancels: int = 0

    @property
    def open_sessions(self) -> int:
        return self.opened - self.closed


@dataclass
class FakeModel:
    """Answers with `script`, token by token, `delay_s` apart; afterwards with EOS, or with x's if `is_endless`."""

    name: str = "umbel/fake-1b"
    script: Sequence[str] = ("Hello", " there", ",", " I", " am", " a", " fake", ".")
    delay_s: float = 0.0
    max_length: int = 2048
    stop_token: str | None = EOS
    is_endless: bool = False
    missing: Sequence[str] = ()
    open_error: Exception | None = None
    error_at: tuple[int, Exception] | None = None  # raised once, before that token of a generation
    cached_tokens: int = 0  # what a generation says of its prompt
    is_uninterruptible: bool = False  # a step sleeps `delay_s` whatever cancel() says
    counts: Counts = field(default_factory=Counts)
    seen_params: list[SamplingParams] = field(default_factory=list)
    sessions: list["FakeSession"] = field(default_factory=list)
    is_closed: bool = False
    vocabulary: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    nodes: Sequence[SeenNode] = field(default_factory=complete)
    swarm_error: SwarmError | None = None
    block_size: BlockSize = SIZE
    reply: Callable[[str], Sequence[str]] | None = None  # chooses the tokens by the last user message

    def token_id(self, piece: str) -> int:
        with self.lock:
            if piece not in self.vocabulary:
                self.vocabulary.append(piece)
            return self.vocabulary.index(piece)

    def encode(self, text: str) -> list[int]:
        return [self.token_id(piece) for piece in PIECES.findall(text)]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.vocabulary[token] for token in ids)

    def open_session(self, max_length: int) -> "FakeSession":
        if self.open_error is not None:
            raise self.open_error
        with self.lock:
            self.counts.opened += 1
        session = FakeSession(self, max_length)
        self.sessions.append(session)
        return session

    def token_bytes(self, token_id: int) -> bytes:
        return self.vocabulary[token_id].encode() if token_id < len(self.vocabulary) else b""

    def embedder(self) -> "FakeEmbedder":
        return FakeEmbedder(self)

    def missing_blocks(self) -> Sequence[str]:
        return self.missing

    def swarm(self) -> ModelSwarm:
        if self.swarm_error is not None:
            raise self.swarm_error
        return ModelSwarm(self.name, "rev", NUM_BLOCKS, time.time(), tuple(self.nodes), 0.08)

    def close(self) -> None:
        self.is_closed = True

    def wait_until_closed(self, timeout_s: float = 10.0) -> None:
        """Wait until no session is open."""
        deadline_s = time.monotonic() + timeout_s
        while self.counts.open_sessions:
            assert time.monotonic() < deadline_s, "a session is left"
            time.sleep(0.01)


class FakeEmbedder:
    """Vectors of four numbers, which depend on the text alone."""

    def __init__(self, model: FakeModel) -> None:
        self._model = model
        self._cancelled = threading.Event()

    def embed(self, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        if any(token >= len(self._model.vocabulary) for ids in token_ids for token in ids):
            raise InvalidRequestError("token ids are unknown")
        is_stuck = any(self._model.decode(ids) == "stuck" for ids in token_ids)
        if self._cancelled.wait(WAIT_S if is_stuck else self._model.delay_s * len(token_ids)):
            raise CancelledStepError("embedding was cancelled")
        if self._model.error_at is not None:
            raise self._model.error_at[1]
        return [self._embed(ids) for ids in token_ids]

    def _embed(self, ids: Sequence[int]) -> list[float]:
        length = len(self._model.decode(ids))
        values = [1.0, length, length % 7, length % 3]
        norm = math.sqrt(sum(value * value for value in values))
        return [value / norm for value in values]

    def cancel(self) -> None:
        with self._model.lock:
            self._model.counts.cancels += 1
        self._cancelled.set()


class FakeSession:
    """One session; the answer restarts the script at every user turn and goes on within one."""

    def __init__(self, model: FakeModel, max_length: int) -> None:
        self.model, self._max_length = model, max_length
        self.ids: list[int] = []
        self.is_closed = False
        self._cancelled = threading.Event()
        self._script: list[str] = []
        self._on_event: EventListener | None = None
        self._num_tokens = 0

    @property
    def token_ids(self) -> Sequence[int]:
        return self.ids

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def text(self) -> str:
        return self.model.decode(self.ids)

    def _append(self, ids: Sequence[int]) -> int:
        if len(self.ids) + len(ids) > self._max_length:
            raise MaxLengthError(len(self.ids), len(ids), self._max_length)
        self.ids.extend(ids)
        with self.model.lock:
            self.model.counts.appended_tokens += len(ids)
        return len(ids)

    def _restart(self, text: str) -> None:
        self._script = list(self.model.reply(text) if self.model.reply else self.model.script)

    def append_text(self, text: str, *, add_special_tokens: bool | None = None) -> int:
        count = self._append(self.model.encode(text))
        self._restart(text)
        return count

    def set_messages(self, messages: Sequence[ChatMessage], *, continue_last: bool = False) -> int:
        if messages[-1].role != ("assistant" if continue_last else "user"):
            raise InvalidRequestError("the last message must be the user's")
        parts = [f"<{message.role}>{message.content}{EOS}" for message in messages]
        whole = "".join(parts)
        prompt = self.model.encode(whole.removesuffix(EOS) if continue_last else whole + "<assistant>")
        kept = 0
        while kept < min(len(prompt), len(self.ids)) and prompt[kept] == self.ids[kept]:
            kept += 1
        del self.ids[kept:]
        self._append(prompt[kept:])
        self._restart(messages[-2 if continue_last else -1].content)
        if continue_last:
            del self._script[: len(self.model.encode(messages[-1].content))]
        return kept

    def keep_messages(self, messages: Sequence[ChatMessage]) -> int:
        prompt = self.model.encode("".join(f"<{message.role}>{message.content}{EOS}" for message in messages))
        while prompt != self.ids[: len(prompt)]:
            prompt.pop()
        del self.ids[len(prompt) :]
        return len(prompt)

    def replace_tail(self, num_tokens: int, token_ids: Sequence[int]) -> None:
        if num_tokens:
            del self.ids[-num_tokens:]
        if any(token >= len(self.model.vocabulary) for token in token_ids):
            raise InvalidRequestError("token ids are unknown")
        if len(self.ids) + len(token_ids) > self._max_length:
            raise MaxLengthError(len(self.ids), len(token_ids), self._max_length)
        self.ids.extend(token_ids)

    @property
    def cached_tokens(self) -> int:
        return self.model.cached_tokens if self._num_tokens else 0

    @property
    def times(self) -> GenerationTimes:
        """As many tokens as were generated last, 10 ms each, over two hops; three of four guesses were right."""
        per_token = TimeShares(0.0, 0.006, 0.003, 0.001, 0.0)
        hops = (
            HopTimes(Span(0, 12), PEERS[0], self._num_tokens, TimeShares(), TimeShares(0.0, 0.004, 0.001)),
            HopTimes(Span(12, 16), PEERS[1], self._num_tokens, TimeShares(), TimeShares(0.0, 0.002, 0.002)),
        )
        total = TimeShares(0.0, 0.006 * self._num_tokens, 0.003 * self._num_tokens, 0.001 * self._num_tokens, 1.5)
        return GenerationTimes(self._num_tokens, total, per_token, per_token, hops, 1, 40, 4, 3)

    def generate(self, params: SamplingParams, on_event: EventListener | None = None) -> Iterator[TextDelta]:
        if len(self.ids) + params.max_new_tokens > self._max_length:
            raise MaxLengthError(len(self.ids), params.max_new_tokens, self._max_length)
        self.model.seen_params.append(params)
        self._cancelled.clear()
        self._on_event, self._num_tokens = on_event, 0
        return self._generate(params)

    def _generate(self, params: SamplingParams) -> Iterator[TextDelta]:
        held: list[int] = []

        def delta(text: str, reason: FinishReason | None = None) -> TextDelta:
            logprobs = (
                () if params.logprobs is None else tuple(self._logprobs(token, params.logprobs) for token in held)
            )
            return TextDelta(text, tuple(held), reason, logprobs)

        for number in range(params.max_new_tokens):
            if self._step_is_cancelled():
                yield delta("", "cancelled")
                return
            self._raise_scripted(number)
            piece = self._script.pop(0) if self._script else ("x " if self.model.is_endless else EOS)
            token = self.model.token_id(piece)
            self.ids.append(token)
            self._num_tokens += 1
            held.append(token)
            with self.model.lock:
                self.model.counts.generated_tokens += 1
            is_last = number + 1 == params.max_new_tokens
            if piece == EOS and params.stop_at_eos:
                yield delta("", "stop")
                return
            if piece.startswith("…") and not is_last:  # a character whose rest is in the next token
                continue
            yield delta(piece, "length" if is_last else None)
            held = []

    def _logprobs(self, token: int, num_top: int) -> TokenLogprobs:
        top = [(token, -0.5), *((other, -1.0 - other) for other in range(len(self.model.vocabulary)) if other != token)]
        return TokenLogprobs(token, -0.5, tuple(top[:num_top]))

    def _step_is_cancelled(self) -> bool:
        if self.model.is_uninterruptible:
            time.sleep(self.model.delay_s)
        return self._cancelled.wait(0 if self.model.is_uninterruptible else self.model.delay_s)

    def _raise_scripted(self, number: int) -> None:
        if self.model.error_at is not None and self.model.error_at[0] == number:
            error, self.model.error_at = self.model.error_at[1], None
            raise error

    def cancel(self) -> None:
        with self.model.lock:
            self.model.counts.cancels += 1
        self._cancelled.set()

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            with self.model.lock:
                self.model.counts.closed += 1


ANSWER = (
    "An umbel is a flower head made of many small flowers, each on its own stalk, and all stalks meet in one point.\n\n"
    "In code that could look like this:\n\n"
    "```python\n"
    "def umbel(num_flowers: int) -> list[str]:\n"
    '    """Return one stalk per flower."""\n'
    '    return [f"stalk {n}" for n in range(num_flowers)]\n'
    "```\n\n"
    "Carrots, dill and fennel all bloom this way."
)
LONG = " ".join(f"word{number}" for number in range(400))
ERRORS: dict[str, SwarmError | Exception] = {
    "lost": StreamLostError("the stream to a node ended"),
    "full": CacheFullError(900, 12),
    "bug": ZeroDivisionError("a secret of the stack"),
    "missing": MissingBlocksError("umbel/fake-1b", [Span(12, 16)]),
}
PEERS = (PeerId("12D3KooWfirst1"), PeerId("12D3KooWother2"), PeerId("12D3KooWthird3"))
_LOST = tuple(RoutePart(span, peer) for span, peer in zip((Span(0, 12), Span(12, 16)), PEERS, strict=False))
_NEW = (_LOST[0], RoutePart(Span(12, 16), PEERS[2]))
EVENTS: dict[str, SessionEvent] = {
    "opened": RouteChanged("opened", (), _LOST, _LOST),
    "looking": Waiting((Span(12, 16),), "looking", 0.0, 30.0),
    "wait30": Waiting((Span(12, 16),), "missing_blocks", 0.4, 29.6),
    "wait29": Waiting((Span(12, 16),), "missing_blocks", 1.4, 28.6),
    "changed": RouteChanged("node_lost", _LOST[1:], _NEW[1:], _NEW),
    "recovered": Recovered(1.5, 40),
}
WENT_ON = ("!tell changed", "!tell recovered")
STORY = ("!tell looking", "!tell wait30", "!pause", "!tell wait29")


PAUSE_S = 0.7  # for the page to show what happens
WAIT_S = 20.0  # of the step that `stuck` asks for, unless it is cancelled


def scripted_reply(text: str) -> Sequence[str]:
    """Choose an answer by the question's first word: an error's, `long`, `wide`, `stuck` and the like.

    `replaced` loses a node and goes on, `vanish` waits for one in vain, `mirror` says what follows, `quote` is a
    bug that tells all of it. Any other word gets the one on umbels.
    """
    words = text.strip().split(" ")
    word = words[0]
    if word == "huge":  # `huge list 1000`
        return PIECES.findall(huge(words[1], int(words[2])))
    if word in ERRORS or word == "quote":
        return ["!raise " + word]
    if word == "mirror":
        return PIECES.findall(text.removeprefix("mirror "))
    special = {
        "long": PIECES.findall(LONG),
        "wide": ["w" * 200_000] * 200,
        "stuck": ["one", " two", "!wait", " three"],
        "replaced": [
            "!tell opened",
            "one",
            " two",
            *STORY,
            "!pause",
            "!tell changed",
            "!tell recovered",
            *[" more"] * 60,
        ],
        "vanish": ["one", " two", *STORY, "!pause", "!raise missing"],
        "rich": PIECES.findall(RICH),
        "arabic": PIECES.findall(ARABIC),
        "hostile": PIECES.findall(HOSTILE),
        "echo": [" answer", ".", "\n\n", "Human", ":", EOS],
        "brief": [" yes", EOS],
        "inside": [" one", " two### three", " four"],
        "hashes": [" one", "#", "#", "#", " four", " five"],
        "held": [" a", "…", "…", "b#c", " d"],
        "letters": [" é", "世", EOS],
    }
    return special.get(word) or PIECES.findall(ANSWER)


class TalkingModel(FakeModel):
    """A fake for a site that people and browsers talk to: errors are asked for by word."""

    def open_session(self, max_length: int) -> "FakeSession":
        with self.lock:
            self.counts.opened += 1
        session = TalkingSession(self, max_length)
        self.sessions.append(session)
        return session


class TalkingSession(FakeSession):
    """Raises the error, tells the event, or waits the time, that the script says; to `prompt` it repeats its own."""

    def set_messages(self, messages: Sequence[ChatMessage], *, continue_last: bool = False) -> int:
        kept = super().set_messages(messages, continue_last=continue_last)
        if messages[-1].content == "prompt":
            told = messages[0].content if messages[0].role == "system" else "none"
            self._script = [*PIECES.findall(told), EOS]
        return kept

    def _step_is_cancelled(self) -> bool:
        while self._script and self._script[0].startswith(("!tell ", "!pause")):
            kind, _, name = self._script.pop(0).partition(" ")
            if kind == "!pause" and self._cancelled.wait(PAUSE_S):
                return True
            if name and self._on_event is not None:
                self._on_event(EVENTS[name])
        if self._script and self._script[0] == "!wait":
            self._script.pop(0)
            return self._cancelled.wait(WAIT_S)
        return super()._step_is_cancelled()

    def _raise_scripted(self, number: int) -> None:
        if self._script and self._script[0] == "!raise quote":  # as a library would that shows what it choked on
            raise ValueError(f"cannot do that with {self._script.pop(0)} of {self.text}")
        if self._script and self._script[0].startswith("!raise "):
            raise ERRORS[self._script.pop(0).removeprefix("!raise ")]
