"""Conversations to token ids, by the model's chat template."""

from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import TemplateError

from swarm_client.generation.text_session import ChatMessage
from swarm_protocol.errors import InvalidRequestError

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'user' %}Human: {{ message['content'] }}\n\n"
    "{% else %}Assistant: {{ message['content'] }}\n\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For models that came without a template, such as BLOOM: plain turns, which every base model has read."""

PLAIN_STOP = ("\n\nHuman:", "\nHuman:")


def chat_token_ids(
    tokenizer: Any, messages: Sequence[ChatMessage], *, continue_last: bool = False, has_turn: bool = True
) -> list[int]:
    """Return the prompt of `messages`, ready for the assistant's turn; without `has_turn` nobody's turn is opened.

    With `continue_last` it ends inside the last message, which is the assistant's.
    Raises InvalidRequestError if there are none, or the template refuses them.
    """
    if not messages:
        raise InvalidRequestError("there is no message to answer")
    if continue_last:
        if messages[-1].role != "assistant":
            raise InvalidRequestError("to continue, the last message must be the assistant's")
        if not messages[-1].content.strip():  # nothing of the answer is there yet
            return chat_token_ids(tokenizer, messages[:-1])
    template = None if tokenizer.chat_template else PLAIN_TEMPLATE
    plain = [{"role": message.role, "content": message.content} for message in messages]
    try:
        ids = tokenizer.apply_chat_template(
            plain,
            chat_template=template,
            add_generation_prompt=has_turn and not continue_last,
            continue_final_message=continue_last,
            tokenize=True,
            return_dict=False,
        )
    except (TemplateError, ValueError) as error:  # transformers raises the latter where it cannot find the message
        raise InvalidRequestError(f"the model's chat template refuses these messages: {error}") from None
    return [int(token_id) for token_id in ids]


def chat_stop(tokenizer: Any) -> tuple[str, ...]:
    """Return the strings that end the assistant's turn besides its end token."""
    return () if tokenizer.chat_template else PLAIN_STOP


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens at the beginning are the same."""
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length


def continued_ids(
    held: Sequence[int],
    wanted: Sequence[int],
    encode: Callable[[str], Sequence[int]],
    decode: Callable[[Sequence[int]], str],
) -> list[int]:
    """Return tokens of the text of `wanted` that begin with as many of `held` as spell its beginning.

    A model writes its answer in other tokens than the tokenizer would; whoever goes on with the answer needs the
    model's, for all of them are computed already.
    """
    same = common_prefix(held, wanted)
    rest, text = held[same:], decode(wanted[same:])
    low, high = 0, len(rest)
    while low < high:  # the beginnings of a beginning fit as well
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text.startswith(decode(rest[:middle])) else (low, middle - 1)
    kept = rest[:low]
    missing = text[len(decode(kept)) :]
    found = [*held[:same], *kept, *(encode(missing) if missing else ())]
    # Some tokenizers join no two texts without a trace, such as a space at the seam.
    return found if kept and decode(found[same:]) == text else list(wanted)
