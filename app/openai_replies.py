"""Pure: what the OpenAI-compatible API answers with.

Fields that are not set are left out: in a stream, a key that is there without having been asked for breaks clients.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length"]


class Reply(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def as_json(self) -> str:
        """Return the JSON of what was set."""
        return self.model_dump_json(exclude_unset=True)


class TopLogprob(Reply):
    """A token that could have been chosen. `bytes` are its text's, which may be a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    """The tokens of a chat answer, or of a piece of it."""

    content: list[TokenLogprob]
    refusal: None


class CompletionLogprobs(Reply):
    """The same in the older form; `text_offset` counts characters of the answer."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class PromptDetails(Reply):
    """`cached_tokens` of the prompt were not computed again."""

    cached_tokens: int


class Usage(Reply):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Timings(Reply):
    """Tokens and milliseconds of prompt and answer, under the names of llama.cpp's server; null where none is known."""

    cache_n: int
    prompt_n: int
    prompt_ms: float | None
    prompt_per_second: float | None
    predicted_n: int
    predicted_ms: float | None
    predicted_per_second: float | None


class AssistantMessage(Reply):
    """The answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Reply):
    """The one choice of a chat completion."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Reply):
    """The answer to a chat completion that is not streamed."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings


class ChunkDelta(Reply):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Reply):
    """The one choice in a chunk."""

    index: int
    delta: ChunkDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(Reply):
    """A piece of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    timings: Timings | None = None
    umbel_event: dict[str, Any] | None = None


class CompletionChoice(Reply):
    """The continuation of the prompt number `index`, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(Reply):
    """The answer to a completion, or a chunk of it: both look the same."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    timings: Timings | None = None
    umbel_event: dict[str, Any] | None = None


class Embedding(Reply):
    """The vector of the input number `index`, as numbers or as base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Reply):
    """Tokens of an embedding request."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Reply):
    """The answer to an embedding request."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ModelObject(Reply):
    """A model, with what a swarm adds: whether all of its blocks are served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int | None
    max_model_len: int | None
    status: Literal["loading", "ready", "incomplete", "failed"]
    missing_blocks: list[str]


class ModelList(Reply):
    """The models of the site."""

    object: Literal["list"]
    data: list[ModelObject]


class ErrorObject(Reply):
    """What went wrong. `code` is what programs match on, `request_id` what the site's log knows it by."""

    message: str
    type: str
    param: str | None
    code: str
    retryable: bool
    request_id: str


class ErrorBody(Reply):
    """An error in OpenAI's form."""

    error: ErrorObject
