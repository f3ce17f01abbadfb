"""Pure: which values a directory takes. Anyone may send it anything, and its memory has no limit of its own."""

from functools import lru_cache
from typing import Any, Final

import msgspec

from swarm_protocol.errors import InvalidRecordError
from swarm_protocol.identity import has_key, verify
from swarm_protocol.ids import PeerId
from swarm_protocol.records import signed_until

MAX_VALUE_BYTES: Final = 2048  # a sealed record (at most 2,000) and some room
MAX_SUBKEY_CHARS: Final = 128  # a peer id has 52
ROUNDING_S: Final = 1e-3  # times travel as float64
MAX_EXPIRY_S: Final = 3600.0  # ahead of now; records live 30 s, and a tombstone only has to outlive a record


def check_value(subkey: str, value: bytes, expires_at_s: float, now_s: float) -> None:
    """Raise InvalidRecordError if a directory would refuse `value` below `subkey`."""
    expires_in_s = expires_at_s - now_s
    if len(value) > MAX_VALUE_BYTES:
        raise InvalidRecordError(f"directory value of {len(value)} bytes: at most {MAX_VALUE_BYTES} are allowed")
    if not (subkey.isascii() and 0 < len(subkey) <= MAX_SUBKEY_CHARS):
        raise InvalidRecordError(
            f"unusable subkey {subkey[:150]!r}: 1 to {MAX_SUBKEY_CHARS} ASCII characters are allowed"
        )
    if expires_in_s > MAX_EXPIRY_S:
        raise InvalidRecordError(f"a directory value lives at most {MAX_EXPIRY_S:.0f} s, not {expires_in_s:.0f} s")
    if not is_own_word(subkey, value, expires_at_s):
        raise InvalidRecordError("below a peer's id only what that peer has signed is kept, and no longer than it says")


def is_own_word(subkey: str, value: bytes, expires_at_s: float) -> bool:
    """Whether `value` may stand below `subkey` until then: below a peer's id, only what that peer has signed."""
    return not has_key(subkey) or expires_at_s <= _signed_until(PeerId(subkey), value) + ROUNDING_S


@lru_cache(maxsize=4096)
def _signed_until(owner: PeerId, value: bytes) -> float:
    # Every lookup brings the same records again, and checking a signature takes 0.1 ms.
    return signed_until(value, owner, verify)


def is_storable(packed_subkey: bytes, packed_value: bytes, expires_at_s: float, now_s: float) -> bool:
    """Whether to keep or believe a value that a stranger sent; subkey and value have to be msgpack text and bytes.

    Values without a subkey are refused: one that expires late would take the place of everybody's subkeys. So is what
    cannot be unpacked: the lookup that meets it would never end.
    """
    return (
        _is_packed_text(packed_subkey)
        and len(packed_subkey) <= MAX_SUBKEY_CHARS + 2
        and _is_packed_bytes(packed_value)
        and len(packed_value) <= MAX_VALUE_BYTES + 3
        and expires_at_s - now_s <= MAX_EXPIRY_S
        and is_own_word(_unpacked(packed_subkey), _unpacked(packed_value), expires_at_s)
    )


def _unpacked(packed: bytes) -> Any:
    return msgspec.msgpack.decode(packed)


def _is_packed_text(packed: bytes) -> bool:
    """Whether this is a msgpack fixstr or str8 of ASCII; longer kinds are above the limit."""
    if packed[:1] == b"\xd9":
        size, text = int.from_bytes(packed[1:2]), packed[2:]
    else:
        size, text = int.from_bytes(packed[:1]) - 0xA0, packed[1:]
        if size >= 32:
            return False
    return 0 < size == len(text) and text.isascii()


def _is_packed_bytes(packed: bytes) -> bool:
    """Whether this is a msgpack bin8 or bin16; longer kinds are above the limit."""
    head_bytes = {b"\xc4": 2, b"\xc5": 3}.get(packed[:1])
    return (
        head_bytes is not None
        and len(packed) >= head_bytes
        and int.from_bytes(packed[1:head_bytes]) == len(packed) - head_bytes
    )


def usable_values(found: object, now_s: float) -> dict[str, bytes]:
    """Return what is well-formed and has not expired of a directory's answer for a key, which comes from strangers.

    An answer is a dict from subkey to pairs of value and expiry.
    """
    if not isinstance(found, dict):
        return {}
    pairs = {subkey: tuple(pair) for subkey, pair in found.items()}
    return {
        subkey: value
        for subkey, (value, expires_at_s) in pairs.items()
        if isinstance(subkey, str) and isinstance(value, bytes) and expires_at_s > now_s
    }
