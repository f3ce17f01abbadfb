"""Pure: the requests of the OpenAI-compatible API, on the fields of `request_models`, and what is wrong with one.

What clients send and cannot be done is refused where the answer would be another than was asked for (`n`, images, JSON
schemas), and told in a header where it is a wish (tools, penalties). All other unknown fields are ignored.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, WithJsonSchema, model_validator

from app.request_models import (
    MAX_MESSAGES,
    MAX_TOKENS,
    Fields,
    FieldsT,
    Sampling,
    Stops,
    Text,
    TokenCount,
    first_problem,
    none_as_default,
)
from swarm_client.generation.text_session import ChatMessage
from swarm_protocol.errors import InvalidRequestError

MAX_TOP_LOGPROBS = 20  # OpenAI's limit
MAX_PROMPTS = 20  # of one completion request; LangChain sends so many
MAX_INPUTS = 2048  # of one embedding request; OpenAI's limit

IGNORED = (
    "tools", "functions", "parallel_tool_calls", "frequency_penalty", "presence_penalty", "logit_bias",
    "reasoning_effort", "verbosity", "prediction", "web_search_options",
)  # fmt: skip
"""Fields of OpenAI's that are wishes here: a request that has one is answered as if it had not."""


class ParamError(InvalidRequestError):
    """A field of a request is wrong or asks for what is not done here; `param` is its name."""

    def __init__(self, message: str, param: str | None) -> None:
        super().__init__(message)
        self.param = param


def _joined_parts(value: object) -> object:
    """Return a message's content as one text; it may come as parts."""
    if value is None:
        return ""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(text, str):
            raise ValueError(f"only parts of type text are understood here, not {str(kind)[:40]!r}")
        texts.append(text)
    return "\n".join(texts)


def _one_or_more(value: object) -> object:
    """Return a text, or the ids of one, as a list of one."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return [value]
    return value


def _without_empty(value: object) -> object:
    if value == "":
        return []
    return [item for item in value if item != ""] if isinstance(value, list) else value


_TEXT = {"type": "string"}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXTS_SCHEMA = {
    "anyOf": [_TEXT, _IDS, {"type": "array", "minItems": 1, "items": {"anyOf": [_TEXT, _IDS]}}],
    "description": "a text, its token ids, or a list of such",
}
_CONTENT_SCHEMA = {
    "anyOf": [
        _TEXT,
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": _TEXT},
                "required": ["type", "text"],
            },
        },
        {"type": "null"},
    ]
}

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
Content = Annotated[Text, BeforeValidator(_joined_parts), WithJsonSchema(_CONTENT_SCHEMA)]
TextOrIds = Text | Annotated[list[TokenId], Field(min_length=1)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None
Flag = Annotated[bool, none_as_default(False)]
LenientStops = Annotated[Stops, BeforeValidator(_without_empty)]


class StreamOptions(Fields):
    """What a stream has besides the answer."""

    include_usage: Flag = False
    include_events: Flag = False


class OpenAIGenerate(Sampling):
    """What chat completions and completions share; `model` None means the site's first model."""

    model: Text | None = None
    max_tokens: TokenCount = None
    seed: Seed = None
    stop: LenientStops = Field(default_factory=list)
    stream: Flag = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None

    @property
    def num_top_logprobs(self) -> int | None:
        """How many alternatives each token comes with; None for no log-probabilities."""
        raise NotImplementedError

    @property
    def max_new_tokens(self) -> int | None:
        """How many tokens were asked for."""
        return self.max_tokens

    @property
    def has_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def has_events(self) -> bool:
        """Whether a stream tells what happens to the route in chunks of its own."""
        return self.stream_options is not None and self.stream_options.include_events


class OpenAIMessage(Fields):
    """One message; the model's template knows `system`, `user` and `assistant`, and gets the others as these."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = ""

    def chat_message(self) -> ChatMessage:
        """Return the message in the client library's terms."""
        role = {"developer": "system", "tool": "user", "function": "user"}.get(self.role, self.role)
        return ChatMessage(role, self.content)


class TextFormat(Fields):
    """The one `response_format` that there is."""

    type: Literal["text"]


class ChatRequest(OpenAIGenerate):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[OpenAIMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: TokenCount = None
    logprobs: Flag = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: TextFormat | None = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    continue_final_message: Flag = False
    add_generation_prompt: bool | None = None

    @model_validator(mode="after")
    def _check_continued(self) -> Self:
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ParamError(
                "continue_final_message: the last message must be the assistant's for it", "continue_final_message"
            )
        if self.continue_final_message and self.add_generation_prompt:
            raise ParamError("add_generation_prompt: must be false to continue a message", "add_generation_prompt")
        if self.add_generation_prompt is False and not self.continue_final_message:
            raise ParamError(
                "add_generation_prompt: only an answer that is continued begins without a turn of its own",
                "add_generation_prompt",
            )
        return self

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ParamError("top_logprobs: logprobs must be true for it", "top_logprobs")
        return self

    @property
    def num_top_logprobs(self) -> int | None:
        """How many alternatives each token comes with; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def max_new_tokens(self) -> int | None:
        """How many tokens were asked for; the newer name wins."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def chat_messages(self) -> tuple[ChatMessage, ...]:
        """Return the conversation in the client library's terms."""
        return tuple(message.chat_message() for message in self.messages)


class CompletionRequest(OpenAIGenerate):
    """`POST /v1/completions`: one or more texts to be continued, each by itself."""

    prompt: Annotated[
        list[TextOrIds],
        Field(min_length=1, max_length=MAX_PROMPTS),
        BeforeValidator(_one_or_more),
        WithJsonSchema(_TEXTS_SCHEMA),
    ]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def num_top_logprobs(self) -> int | None:
        """How many alternatives each token comes with; None for no log-probabilities."""
        return self.logprobs


class EmbeddingsRequest(Fields):
    """`POST /v1/embeddings`."""

    model: Text | None = None
    input: Annotated[
        list[TextOrIds],
        Field(min_length=1, max_length=MAX_INPUTS),
        BeforeValidator(_one_or_more),
        WithJsonSchema(_TEXTS_SCHEMA),
    ]
    encoding_format: Annotated[Literal["float", "base64"], none_as_default("float")] = "float"
    dimensions: None = None


def parse_openai(kind: type[FieldsT], values: Mapping[str, Any]) -> FieldsT:
    """Return `values` checked against `kind`. Raises ParamError naming the first wrong field."""
    try:
        return kind.model_validate(values)
    except (ValidationError, RecursionError) as error:
        where, message = first_problem(error)
        raise ParamError(message, _param(where)) from None


def ignored_params(values: Mapping[str, Any]) -> list[str]:
    """Return the fields of a request that ask for something and are ignored."""
    return [name for name in IGNORED if values.get(name)]


_BRANCHES = {"str", "int", "constrained-str", "constrained-int", "function-after"}


def _param(where: tuple[int | str, ...]) -> str | None:
    """Return a place as a path of names; those that pydantic gives to the branches of a union are left out."""
    path = []
    for part in where:
        if isinstance(part, str) and (part in _BRANCHES or not part.isidentifier()):
            break
        path.append(str(part))
    return ".".join(path) or None
