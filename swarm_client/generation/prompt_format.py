"""Conversations to token ids, by the model's chat template."""

from collections.abc import Sequence
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


def chat_token_ids(tokenizer: Any, messages: Sequence[ChatMessage]) -> list[int]:
    """Return the prompt of `messages`, ready for the assistant's turn.

    Raises InvalidRequestError if there are none, or the template refuses them.
    """
    if not messages:
        raise InvalidRequestError("there is no message to answer")
    template = None if tokenizer.chat_template else PLAIN_TEMPLATE
    plain = [{"role": message.role, "content": message.content} for message in messages]
    try:
        ids = tokenizer.apply_chat_template(
            plain, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except TemplateError as error:
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
