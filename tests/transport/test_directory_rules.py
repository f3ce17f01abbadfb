"""What a directory takes from strangers."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_protocol.identity import create_identity
from swarm_protocol.transport.directory_rules import MAX_SUBKEY_CHARS, MAX_VALUE_BYTES, is_storable, usable_values

NOW_S = 1_700_000_000.0
packed = msgspec.msgpack.encode
ascii_text = st.text(st.characters(max_codepoint=127), min_size=1, max_size=MAX_SUBKEY_CHARS)


@given(ascii_text, st.binary(max_size=MAX_VALUE_BYTES), st.floats(-1e9, 3600))
def test_what_peers_store_is_taken(subkey: str, value: bytes, expires_in_s: float):
    assert is_storable(packed(subkey), packed(value), NOW_S + expires_in_s, NOW_S)


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_whatever_is_taken_can_be_unpacked(subkey: bytes, value: bytes):
    if is_storable(subkey, packed(b"value"), NOW_S, NOW_S):
        assert isinstance(msgspec.msgpack.decode(subkey), str)
    if is_storable(packed("subkey"), value, NOW_S, NOW_S):
        assert isinstance(msgspec.msgpack.decode(value), bytes)


@pytest.mark.parametrize(
    ("subkey", "value", "expires_in_s"),
    [
        (b"", packed(b"v"), 0),
        (packed(None), packed(b"v"), 0),
        (packed(""), packed(b"v"), 0),
        (packed(7), packed(b"v"), 0),
        (packed("ñ"), packed(b"v"), 0),
        (packed("n" * 129), packed(b"v"), 0),
        (packed("n" * 300), packed(b"v"), 0),
        (packed("n")[:-1], packed(b"v"), 0),
        (packed("n") + b"n", packed(b"v"), 0),
        (packed("n"), b"", 0),
        (packed("n"), packed("text"), 0),
        (packed("n"), packed([1, 2]), 0),
        (packed("n"), packed(b"v")[:-1], 0),
        (packed("n"), packed(b"v") + b"v", 0),
        (packed("n"), b"\xc5\x00", 0),
        (packed("n"), packed(bytes(2049)), 0),
        (packed("n"), packed(bytes(70_000)), 0),
        (packed("n"), packed(b"v"), 3601),
    ],
)
def test_anything_else_is_refused(subkey: bytes, value: bytes, expires_in_s: float):
    assert not is_storable(subkey, value, NOW_S + expires_in_s, NOW_S)


def test_of_an_answer_only_sound_values_are_used():
    answer = {"good": (b"v", 11.0), "old": (b"v", 10.0), 7: (b"v", 11.0), "text": ("v", 11.0), None: (b"v", 11.0)}
    assert usable_values(answer, 10.0) == {"good": b"v"}
    assert usable_values(None, 10.0) == {}
    assert usable_values(b"a value without subkeys", 10.0) == {}


def test_below_a_peers_id_only_its_own_words_are_taken_and_no_longer_than_they_hold():
    identity, other = create_identity(), create_identity()
    payload = packed({"expires_at_s": NOW_S + 30, "state": "online"})
    signed = packed((payload, identity.sign(payload)))

    def is_taken(owner: str, value: bytes, expires_in_s: float) -> bool:
        return is_storable(packed(owner), packed(value), NOW_S + expires_in_s, NOW_S)

    assert is_taken(identity.peer_id, signed, 30)
    assert is_taken(identity.peer_id, signed, 10)
    assert not is_taken(identity.peer_id, signed, 30.1)
    assert not is_taken(other.peer_id, signed, 30)
    assert not is_taken(identity.peer_id, packed((payload, other.sign(payload))), 30)
    assert not is_taken(identity.peer_id, payload, 30)
    assert not is_taken(identity.peer_id, packed((packed("no map"), identity.sign(packed("no map")))), 30)
    assert is_taken("not a peer id", signed, 60)
