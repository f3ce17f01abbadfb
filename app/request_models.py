"""Pure: what requests may hold, for every API of the site, and how what is wrong with one is told.

Websocket frames, the one-shot API and the OpenAI-compatible paths take their fields from here, so that a field has one
range and one meaning. Unknown fields are ignored, so that later versions may add some.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from swarm_client.generation.text_session import ChatMessage
from swarm_protocol.errors import InvalidRequestError

MAX_STOPS, MAX_STOP_CHARS = 16, 256  # the predecessor's clients send up to 6 stops; longer ones are prompts by mistake
MAX_MESSAGES = 1000  # far above what fits in any context
MAX_TOKENS = 2**31 - 1


def none_as_default(default: object) -> BeforeValidator:
    """Take null for a field that is not there."""
    return BeforeValidator(lambda value: default if value is None else value)


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _whole_characters(text: str) -> str:
    """Replace halves of characters, which JSON can carry and no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _empty_as_none(value: object) -> object:
    return None if value == "" else value  # every text ends with the empty one: the predecessor sent one reply


Text = Annotated[str, AfterValidator(_whole_characters)]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS), BeforeValidator(_as_list), none_as_default(())]
TokenCount = Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None
RequestId = Annotated[str, Field(max_length=64)]


class Fields(BaseModel):
    """A part of a request."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


FieldsT = TypeVar("FieldsT", bound=Fields)


class Sampling(Fields):
    """How tokens are chosen; None everywhere means the default of the one who applies it."""

    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None


class LegacyGenerate(Sampling):
    """Protocol 2 `generate`."""

    inputs: Text | None = None
    max_new_tokens: TokenCount = None
    max_length: TokenCount = None
    do_sample: Annotated[bool, none_as_default(False)] = False
    stop_sequence: Annotated[Stop | None, BeforeValidator(_empty_as_none)] = None
    extra_stop_sequences: Stops = Field(default_factory=list)


class OneShot(LegacyGenerate):
    """The fields of `POST /api/v1/generate`; with `times` the answer says where its time went."""

    times: Annotated[bool, none_as_default(False)] = False


class LegacyOpen(Fields):
    """Protocol 2 `open_inference_session`; `model` None means the site's first model."""

    model: str | None = None
    max_length: TokenCount = None


class Open(Fields):
    """Protocol 3 `open`; with `resume` an answer goes on for a while when the connection breaks.

    `embed` is the token of an embedded chat, whose key then decides about model and prompt.
    """

    model: str | None = None
    max_length: TokenCount = None
    resume: Annotated[bool, none_as_default(False)] = False
    embed: Annotated[str, Field(max_length=512)] | None = None


class Resume(Fields):
    """Protocol 3 `resume`, in place of an `open`: the frames of the generation `id` from `from_seq` on."""

    token: Annotated[str, Field(max_length=64)]
    id: RequestId
    from_seq: Annotated[int, Field(ge=0, le=MAX_TOKENS)] = 0


class Message(Fields):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text


class Params(Sampling):
    """The `params` of a protocol 3 `generate`."""

    max_new_tokens: TokenCount = Field(default=None, validation_alias=AliasChoices("max_new_tokens", "max_tokens"))
    do_sample: bool | None = None


class Generate(Fields):
    """Protocol 3 `generate`: the whole conversation, of which the session computes only what is new.

    With `continue` the last message is an assistant's, and the answer goes on with its text.
    With `times` the `done` says where the time went.
    """

    id: RequestId
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    params: Annotated[Params, none_as_default({})] = Params()
    stop: Stops = Field(default_factory=list)
    is_continued: Annotated[bool, none_as_default(False)] = Field(default=False, validation_alias="continue")
    times: Annotated[bool, none_as_default(False)] = False

    def chat_messages(self) -> tuple[ChatMessage, ...]:
        """Return the conversation in the client library's terms."""
        return tuple(ChatMessage(message.role, message.content) for message in self.messages)


class Cancel(Fields):
    """Protocol 3 `cancel`: end the generation `id`, or whichever runs; the session stays."""

    id: RequestId | None = None


class Rewind(Fields):
    """Protocol 3 `rewind`: keep the first `messages` messages of the conversation that was sent last."""

    messages: Annotated[int, Field(ge=0, le=MAX_MESSAGES)]


class Bye(Fields):
    """Protocol 3 `bye`: the client leaves, and nothing is to be kept for it."""


class Ping(Fields):
    """Protocol 3 `ping`, for proxies that count only frames of an application."""

    id: RequestId | None = None


def parse_fields(kind: type[FieldsT], values: Any) -> FieldsT:
    """Return `values` checked against `kind`. Raises InvalidRequestError naming the first wrong field."""
    try:
        return kind.model_validate(values)
    except (ValidationError, RecursionError) as error:
        raise InvalidRequestError(first_problem(error)[1]) from None


def first_problem(error: ValidationError | RecursionError) -> tuple[tuple[int | str, ...], str]:
    """Return where the first wrong field is, and what is wrong with it, in a sentence that names it."""
    if not isinstance(error, ValidationError):
        return (), "the request is nested too deeply"
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in problem["loc"])[:100]
    return problem["loc"], f"{where or 'request'}: {problem['msg']}"
