"""What a chat site needs of a distributed model, in text and token ids; nobody here needs to know torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from swarm_client.events import EventListener
from swarm_client.generation_times import GenerationTimes
from swarm_client.model_swarm import BlockSize, ModelSwarm

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next tokens are chosen. `temperature` 0 or `do_sample` False mean greedy; None means not applied.

    `stop` are strings that end the answer and are not part of it; so does the end-of-turn token with `stop_at_eos`.
    `skip_special_tokens` False shows the text of special tokens. One seed gives one text; None takes a random one.
    With `logprobs` each token comes with its probability and with those of that many most probable ones.
    """

    max_new_tokens: int
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_at_eos: bool = True
    skip_special_tokens: bool = True
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How probable the model held a token: natural logarithms, before temperature, penalties and any cut of sampling.

    `top` are the most probable tokens at this place with theirs, the best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of an answer: `text` never ends inside a character and never holds the beginning of a stop string.

    `token_ids` are the tokens behind it, which may be none or several. `finish_reason` is set on the last delta only.
    `logprobs` are those of these tokens where they were asked for, else empty.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


class TextSession(Protocol):
    """One inference session seen as text. Blocking; used by one thread at a time, except `cancel`.

    `token_ids` holds everything that was appended or generated, in order. The node caches all of it but the pending
    tail; `rewind` drops the rest without a prefill.
    """

    @property
    def token_ids(self) -> Sequence[int]:
        """All tokens of the session."""

    @property
    def max_length(self) -> int:
        """The most tokens that the session can hold."""

    def append_text(self, text: str, *, add_special_tokens: bool | None = None) -> int:
        """Tokenize `text` behind what is there; return the number of tokens.

        `add_special_tokens` None adds them only when the session is still empty.
        Raises MaxLengthError if the session would be too long, and then appends nothing.
        """

    def set_messages(self, messages: Sequence[ChatMessage], *, continue_last: bool = False) -> int:
        """Make the session hold the chat prompt of `messages`, ready for the assistant's turn.

        With `continue_last` the last message is the assistant's, and what is generated next goes on with its text.
        Keeps the longest prefix of tokens that agrees with what is there. Returns the number of kept tokens.
        Raises MaxLengthError if the prompt leaves no room, InvalidRequestError if the template refuses the messages.
        """

    def keep_messages(self, messages: Sequence[ChatMessage]) -> int:
        """Drop the tokens behind those that the chat prompt of `messages` begins with; return how many stay.

        Raises InvalidRequestError if the template refuses the messages.
        """

    def replace_tail(self, num_tokens: int, token_ids: Sequence[int]) -> None:
        """Drop the last `num_tokens` tokens and put `token_ids` in their place."""

    def generate(self, params: SamplingParams, on_event: EventListener | None = None) -> Iterator[TextDelta]:
        """Yield the continuation piece by piece; the session afterwards ends with the last generated token.

        Closing the iterator cancels. `on_event` is told what happens to the route, by the thread that asks for the
        next delta, while it waits; what it raises ends the generation. Raises MaxLengthError before the first token if
        `max_new_tokens` cannot fit, SwarmError with a retryable code when a node is lost and no other takes over.
        """

    @property
    def cached_tokens(self) -> int:
        """How many tokens the last `generate` found cached, in the session or from earlier ones; 0 before a step."""

    @property
    def times(self) -> GenerationTimes:
        """Where the time of the last `generate` went until now; the thread's that generates."""

    def cancel(self) -> None:
        """End a running `generate` within one step, with finish_reason `cancelled`. Any thread."""

    def close(self) -> None:
        """Free the caches at the nodes. Idempotent."""


class TextEmbedder(Protocol):
    """Turns tokens into vectors. Blocking; used by one thread at a time, except `cancel`."""

    def embed(self, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return a vector of unit length for each sequence: the mean of its last hidden states, behind the final norm.

        Raises InvalidRequestError for an empty sequence, MaxLengthError for one that is too long, CancelledStepError,
        and SwarmError for what happens in the swarm.
        """

    def cancel(self) -> None:
        """End a running `embed` now, and all later ones. Any thread."""


class TextModel(Protocol):
    """A distributed model with its tokenizer."""

    @property
    def name(self) -> str:
        """The name under which the swarm knows the model."""

    @property
    def max_length(self) -> int:
        """The most tokens that a session of this model can be opened for."""

    @property
    def stop_token(self) -> str | None:
        """The text of the token that ends an assistant's turn; None if the model has none."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without special tokens."""

    def open_session(self, max_length: int) -> TextSession:
        """Return an empty session for up to `max_length` tokens. Raises SwarmError when the swarm cannot hold it."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token stands for in a text, as UTF-8; a token may be a part of a character."""

    def embedder(self) -> TextEmbedder:
        """Return what turns tokens into vectors."""

    def missing_blocks(self) -> Sequence[str]:
        """Return the runs of blocks that no node serves now, as people read them; empty when one can generate."""

    @property
    def block_size(self) -> BlockSize:
        """How much memory a block takes."""

    def swarm(self) -> ModelSwarm:
        """Return what is known of the model's nodes now, without asking anybody but for the first time.

        Raises SwarmError if nothing can be known.
        """
