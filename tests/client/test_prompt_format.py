"""Prompts that go on with an answer: nothing that a session holds is given up for another spelling of it."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_client.generation.prompt_format import chat_token_ids, continued_ids
from swarm_client.generation.text_session import ChatMessage
from swarm_protocol.errors import InvalidRequestError

PIECES = ("a", "b", "ab", "ba", "aba", "c", "abc")


def decode(token_ids: Sequence[int]) -> str:
    return "".join(PIECES[token_id] for token_id in token_ids)


def encode(text: str) -> list[int]:
    """Take the longest piece each time, as tokenizers do and models do not."""
    found: list[int] = []
    while text:
        piece = max((piece for piece in PIECES if text.startswith(piece)), key=len)
        found.append(PIECES.index(piece))
        text = text[len(piece) :]
    return found


tokens = st.lists(st.integers(0, len(PIECES) - 1), max_size=12)


@given(tokens, tokens)
def test_what_was_generated_stays_whatever_its_tokens(held: list[int], more: list[int]) -> None:
    wanted = encode(decode(held) + decode(more))
    found = continued_ids(held, wanted, encode, decode)
    assert decode(found) == decode(wanted)
    assert found[: len(held)] == held


@given(tokens, tokens)
def test_any_text_comes_out_whatever_is_held(held: list[int], wanted: list[int]) -> None:
    assert decode(continued_ids(held, wanted, encode, decode)) == decode(wanted)


def test_an_answer_that_was_shortened_keeps_its_beginning() -> None:
    assert continued_ids([0, 1, 5, 5, 3], encode("abc"), encode, decode) == [0, 1, 5]


class Letters:
    """A tokenizer of letters whose template marks turns; `continue_final_message` as transformers does it."""

    chat_template = "x"

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> list[int]:
        text = "".join(f"<{message['role'][0]}>{message['content']}|" for message in messages)
        if options["continue_final_message"]:
            assert not options["add_generation_prompt"]
            text = text[:-1]
        return [ord(letter) for letter in text + ("<a>" if options["add_generation_prompt"] else "")]


QUESTION, ANSWER = ChatMessage("user", "why"), ChatMessage("assistant", "so")


@pytest.mark.parametrize(
    ("messages", "options", "prompt"),
    [
        ([QUESTION], {}, "<u>why|<a>"),
        ([QUESTION, ANSWER], {"continue_last": True}, "<u>why|<a>so"),
        ([QUESTION, ChatMessage("assistant", " ")], {"continue_last": True}, "<u>why|<a>"),
        ([QUESTION, ANSWER], {"has_turn": False}, "<u>why|<a>so|"),
    ],
)
def test_a_prompt_ends_where_the_answer_is_to_go_on(
    messages: list[ChatMessage], options: dict[str, bool], prompt: str
) -> None:
    assert "".join(map(chr, chat_token_ids(Letters(), messages, **options))) == prompt


def test_only_an_answer_can_be_continued() -> None:
    with pytest.raises(InvalidRequestError, match="assistant"):
        chat_token_ids(Letters(), [QUESTION], continue_last=True)
