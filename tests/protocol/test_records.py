"""Directory records: only the owner's, in time, and of bounded size."""

import dataclasses
import hashlib
import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_protocol.errors import InvalidRecordError
from swarm_protocol.ids import PeerId
from swarm_protocol.records import MAX_PINGS, NodeRecord, directory_key, directory_keys, newest_records, seal, unseal

NOW_S = 1_000_000.0
OWNER = PeerId("12D3KooWOwner")
RECORD = NodeRecord(
    peer_id=OWNER,
    model="SmolLM2-135M-Instruct",
    revision="0123456789abcdef",
    start_block=0,
    end_block=15,
    state="online",
    incarnation=3,
    published_s=NOW_S,
    expires_at_s=NOW_S + 30,
    versions=(1,),
    software="umbel 0.1.0",
    dtype="float32",
    numerics="0123456789abcdef/float32/cpu",
    free_tokens=1000,
    max_tokens=2000,
    name="a volunteer",
)

ROUTING_FIELDS = ("block_step_s", "block_token_s", "queue_s", "pings_s")


def sign_as(peer_id: PeerId, payload: bytes) -> bytes:
    return hashlib.sha256(peer_id.encode() + payload).digest()


def verify(peer_id: PeerId, payload: bytes, signature: bytes) -> bool:
    return signature == sign_as(peer_id, payload)


def sealed(record: NodeRecord, signer: PeerId = OWNER) -> bytes:
    return seal(record, lambda payload: sign_as(signer, payload))


def test_each_peer_counts_once_with_its_latest_start() -> None:
    old = dataclasses.replace(RECORD, published_s=NOW_S + 50, state="offline")
    moved = dataclasses.replace(RECORD, start_block=20, end_block=30, incarnation=4)
    other = dataclasses.replace(RECORD, peer_id="12D3KooWOther")
    refreshed = dataclasses.replace(other, published_s=NOW_S + 10)
    for found in itertools.permutations([old, moved, other, refreshed]):
        assert newest_records(found) == sorted([moved, refreshed], key=lambda record: record.peer_id)


def test_a_record_survives_the_directory() -> None:
    assert unseal(sealed(RECORD), OWNER, verify, NOW_S) == RECORD


@pytest.mark.parametrize(
    ("value", "owner", "now_s"),
    [
        (sealed(RECORD, PeerId("12D3KooWMallory")), OWNER, NOW_S),
        (sealed(RECORD), PeerId("12D3KooWMallory"), NOW_S),
        (sealed(RECORD), OWNER, NOW_S + 31),
        (sealed(dataclasses.replace(RECORD, expires_at_s=NOW_S + 3600)), OWNER, NOW_S),
        (b"", OWNER, NOW_S),
        (b"\x92\xc4\x00\xc4\x00", OWNER, NOW_S),
        (bytes(2001), OWNER, NOW_S),
    ],
    ids=["signed by another", "under another's name", "expired", "lives too long", "empty", "no payload", "too large"],
)
def test_what_is_not_the_owners_own_word_is_refused(value: bytes, owner: PeerId, now_s: float) -> None:
    with pytest.raises(InvalidRecordError):
        unseal(value, owner, verify, now_s)


def test_a_record_without_what_routing_needs_is_as_good_as_before() -> None:
    fields = {name: getattr(RECORD, name) for name in NodeRecord.__slots__ if name not in ROUTING_FIELDS}
    payload = msgspec.msgpack.encode(fields)
    value = msgspec.msgpack.encode((payload, sign_as(OWNER, payload)))
    assert unseal(value, OWNER, verify, NOW_S) == RECORD


@pytest.mark.parametrize("seconds", [-0.1, 60.1, float("nan"), float("inf"), "0.1", True])
@pytest.mark.parametrize("field", ROUTING_FIELDS)
def test_figures_that_cannot_be_reckoned_with_are_refused(field: str, seconds: object) -> None:
    value = sealed(dataclasses.replace(RECORD, **{field: (("p", seconds),) if field == "pings_s" else seconds}))
    with pytest.raises(InvalidRecordError):
        unseal(value, OWNER, verify, NOW_S)


def test_a_record_names_only_some_neighbours_and_has_room_for_them() -> None:
    peer_id = "12D3KooW" + "x" * 44
    full = dataclasses.replace(
        RECORD, model="m" * 128, name="n" * 40, block_step_s=0.01, block_token_s=0.001, queue_s=0.1,
        pings_s=((peer_id, 0.123456),) * MAX_PINGS,
    )  # fmt: skip
    assert unseal(sealed(full), OWNER, verify, NOW_S) == full
    assert len(sealed(full)) < 1500
    with pytest.raises(InvalidRecordError):
        unseal(sealed(dataclasses.replace(full, pings_s=((peer_id, 0.1),) * (MAX_PINGS + 1))), OWNER, verify, NOW_S)


@given(st.binary(max_size=300))
def test_any_bytes_give_a_record_or_a_typed_error(value: bytes) -> None:
    with pytest.raises(InvalidRecordError):
        unseal(value, OWNER, lambda *_: True, NOW_S)


def test_an_oversized_record_is_not_published() -> None:
    with pytest.raises(InvalidRecordError):
        sealed(dataclasses.replace(RECORD, numerics="x" * 1900))


@pytest.mark.parametrize("fields", [{"end_block": 0}, {"model": ""}, {"model": "a b"}, {"model": "-x"}])
def test_a_senseless_record_cannot_be_made(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="record needs"):
        dataclasses.replace(RECORD, **fields)


def test_every_start_block_has_a_key_among_those_a_client_reads() -> None:
    keys = directory_keys("m", 30)
    assert len(keys) == 4
    assert {directory_key("m", block) for block in range(30)} == set(keys)
