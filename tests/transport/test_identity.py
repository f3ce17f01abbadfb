"""Identities: the file format, the peer id, signatures."""

import logging
from pathlib import Path

import base58
import pytest

from swarm_protocol.errors import ConfigError
from swarm_protocol.identity import (
    Identity,
    create_identity,
    decode_identity,
    load_identity,
    load_or_create_identity,
    verify,
)
from swarm_protocol.ids import PeerId, parse_peer_id

# The Ed25519 example of libp2p's "Peer Ids and Keys" specification.
SPEC_KEY = bytes.fromhex(
    "080112407e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d"
    "1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"
)
SPEC_PUBLIC_KEY = bytes.fromhex("080112201ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")


def test_the_key_of_the_specification_is_read_and_written():
    identity = decode_identity(SPEC_KEY)
    assert identity.encode() == SPEC_KEY
    assert base58.b58decode(identity.peer_id) == b"\x00\x24" + SPEC_PUBLIC_KEY


def test_peer_ids_are_those_of_ed25519_keys():
    peer_id = create_identity().peer_id
    assert peer_id.startswith("12D3KooW")
    assert len(peer_id) == 52
    assert parse_peer_id(peer_id) == peer_id


def test_a_signature_verifies_with_the_peer_id_alone():
    identity = create_identity()
    assert verify(identity.peer_id, b"data", identity.sign(b"data"))


def test_anything_else_does_not_verify():
    identity, other = create_identity(), create_identity()
    signature = identity.sign(b"data")
    assert not verify(identity.peer_id, b"date", signature)
    assert not verify(other.peer_id, b"data", signature)
    assert not verify(identity.peer_id, b"data", signature[:-1])
    assert not verify(identity.peer_id, b"data", bytes(64))
    assert not verify(identity.peer_id, b"data", b"")


@pytest.mark.parametrize(
    "peer_id",
    ["", "0OIl", "ñ", "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", "1" * 52, "z" * 52, "z" * 100_000, "12D3KooW"],
)
def test_peer_ids_without_a_key_never_verify(peer_id: str):
    assert not verify(PeerId(peer_id), b"data", bytes(64))


def test_the_same_seed_gives_the_same_identity():
    assert Identity(bytes(32)).peer_id == Identity(bytes(32)).peer_id
    with pytest.raises(ValueError, match="32"):
        Identity(bytes(31))


def test_the_private_key_is_not_shown():
    identity = create_identity()
    assert repr(identity) == f"Identity({identity.peer_id})"


def test_a_file_is_made_once_and_is_readable_by_its_owner_alone(tmp_path: Path):
    path = tmp_path / "identity"
    made = load_or_create_identity(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_bytes() == made.encode()
    assert load_or_create_identity(path).peer_id == made.peer_id
    assert load_identity(path).peer_id == made.peer_id


def test_a_file_that_others_can_read_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "identity"
    load_or_create_identity(path)
    path.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        load_identity(path)
    assert "chmod 600" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        SPEC_KEY[:-1],
        SPEC_KEY + b"\x00",
        b"\x08\x00" + SPEC_KEY[2:],
        SPEC_KEY[:-1] + b"\x00",
        bytes(2000),
    ],
    ids=["empty", "text", "short", "long", "another kind", "halves that differ", "zeros"],
)
def test_foreign_files_are_refused_and_left_alone(tmp_path: Path, content: bytes):
    path = tmp_path / "identity"
    path.write_bytes(content)
    for load in (load_identity, load_or_create_identity):
        with pytest.raises(ConfigError, match=str(path)):
            load(path)
    assert path.read_bytes() == content


def test_files_that_cannot_be_read_or_made_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_identity(tmp_path / "missing")
    with pytest.raises(ConfigError, match="cannot read"):
        load_or_create_identity(tmp_path)
    with pytest.raises(ConfigError, match="cannot write"):
        load_or_create_identity(tmp_path / "no folder" / "identity")


def test_a_disk_that_is_full_leaves_no_half_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        load_or_create_identity(tmp_path / "key")
    assert not list(tmp_path.iterdir())
