"""Pure: which values a directory takes. Anyone may send it anything, and its memory has no limit of its own."""

from typing import Final

from swarm_protocol.errors import InvalidRecordError

MAX_VALUE_BYTES: Final = 2048  # a sealed record (2,000, DESIGN D7) and some room
MAX_SUBKEY_CHARS: Final = 128  # a peer id has 52
MAX_EXPIRY_S: Final = 3600.0  # ahead of now; records live 30 s, and a tombstone only has to outlive a record


def check_value(subkey: str, value: bytes, expires_in_s: float) -> None:
    """Raise InvalidRecordError if a directory would refuse `value` below `subkey`."""
    if len(value) > MAX_VALUE_BYTES:
        raise InvalidRecordError(f"directory value of {len(value)} bytes: at most {MAX_VALUE_BYTES} are allowed")
    if not (subkey.isascii() and 0 < len(subkey) <= MAX_SUBKEY_CHARS):
        raise InvalidRecordError(
            f"unusable subkey {subkey[:150]!r}: 1 to {MAX_SUBKEY_CHARS} ASCII characters are allowed"
        )
    if expires_in_s > MAX_EXPIRY_S:
        raise InvalidRecordError(f"a directory value lives at most {MAX_EXPIRY_S:.0f} s, not {expires_in_s:.0f} s")


def is_storable(packed_subkey: bytes, packed_value: bytes, expires_in_s: float) -> bool:
    """Whether to keep or believe a value that a stranger sent; subkey and value are msgpack.

    Values without a subkey are refused: one that expires late would take the place of everybody's subkeys.
    """
    head = packed_subkey[:1]
    is_text = (
        b"\xa0" < head <= b"\xbf" or head == b"\xd9"
    )  # fixstr and str8; ASCII up to MAX_SUBKEY_CHARS is one of them
    return (
        is_text
        and len(packed_subkey) <= MAX_SUBKEY_CHARS + 2
        and len(packed_value) <= MAX_VALUE_BYTES + 3  # the head of a msgpack bin16
        and expires_in_s <= MAX_EXPIRY_S
    )
