"""Pure: what a single token stands for, in bytes; those of a character that spans tokens included."""

import re
from functools import cache
from typing import Any

_BROKEN = "\ufffd"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How SentencePiece writes a token that is one byte."""

_ANCHOR = "a"
"""A text to decode a token behind: at the very beginning some tokenizers leave out its space."""


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """Return the bytes of `token_id`, special tokens by their name; empty for an id that means nothing."""
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if piece is None:
        return b""
    text = _text_behind_anchor(tokenizer, token_id)
    if _BROKEN not in text:
        return text.encode()
    byte = _BYTE_PIECE.fullmatch(piece)
    if byte:
        return bytes([int(byte[1], 16)])
    found = [_byte_alphabet().get(character) for character in piece]
    known = [value for value in found if value is not None]
    return bytes(known) if len(known) == len(found) else text.encode()


def _text_behind_anchor(tokenizer: Any, token_id: int) -> str:
    anchor = list(tokenizer.encode(_ANCHOR, add_special_tokens=False))
    before = str(tokenizer.decode(anchor, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    whole = tokenizer.decode([*anchor, token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(whole)[len(before) :]


@cache
def _byte_alphabet() -> dict[str, int]:
    """Return the byte for each letter of byte-level BPE (Radford et al. 2019, GPT-2's `bytes_to_unicode`)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + at): byte for at, byte in enumerate(hidden)}
