"""What nodes say before they move: signed, short, and gone when its time is over."""

from dataclasses import replace

import msgspec

from swarm_protocol.identity import create_identity, verify
from swarm_protocol.move_claims import MAX_CLAIM_BYTES, MoveClaim, claims_among, claims_key, seal_claim
from swarm_protocol.records import directory_keys, signed_until
from swarm_protocol.transport.directory_rules import check_value

ME, STRANGER = create_identity(), create_identity()
CLAIM = MoveClaim(ME.peer_id, 3, 5, 7, "0123456789abcdef", 1000.0)


def test_a_claim_is_kept_by_a_directory_and_read_by_everybody():
    value = seal_claim(CLAIM, ME.sign)
    check_value(ME.peer_id, value, 1000.0, 990.0)
    assert signed_until(value, ME.peer_id, verify) == 1000.0
    assert len(value) <= MAX_CLAIM_BYTES
    assert claims_among({ME.peer_id: value}, verify, 999.0) == [CLAIM]
    assert claims_key("m") not in directory_keys("m", 1000)


def test_what_is_forged_expired_or_malformed_is_no_claim():
    value = seal_claim(CLAIM, ME.sign)
    payload, _ = msgspec.msgpack.decode(value)
    assert claims_among({ME.peer_id: value}, verify, 1000.0) == []
    assert claims_among({STRANGER.peer_id: value}, verify, 999.0) == []
    for wrong in (
        seal_claim(CLAIM, STRANGER.sign),
        msgspec.msgpack.encode((payload, b"x" * 64)),
        seal_claim(replace(CLAIM, round_number=-1), ME.sign),
        seal_claim(replace(CLAIM, revision="x" * MAX_CLAIM_BYTES), ME.sign),
        value[:-1],
        b"",
        b"\xc1",
    ):
        assert claims_among({ME.peer_id: wrong}, verify, 999.0) == []
