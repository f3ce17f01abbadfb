"""A peer's identity: an Ed25519 key in libp2p's file format, and signatures that verify with nothing but a peer id.

The peer id of an Ed25519 key is its public key, wrapped in an identity multihash and written in base58 (libp2p
"Peer Ids and Keys", https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md), so it always reads `12D3KooW…`.
"""

import logging
import os
from pathlib import Path
from typing import Final

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from swarm_protocol.errors import ConfigError
from swarm_protocol.ids import PeerId

logger = logging.getLogger(__name__)

SEED_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64

# The protobuf messages PrivateKey and PublicKey of libp2p have a single encoding for Ed25519 (the specification demands
# a deterministic one), so both are a fixed head and raw bytes: field 1 (varint) is the key type, 1; field 2 is the key.
_PRIVATE_KEY_HEAD: Final = bytes.fromhex("08011240")  # 64 bytes follow: seed, public key
_PUBLIC_KEY_HEAD: Final = bytes.fromhex("08011220")  # 32 bytes follow
_IDENTITY_MULTIHASH_HEAD: Final = bytes.fromhex("0024")  # code 0 "identity", 36 bytes follow


class Identity:
    """A private key and the peer id that belongs to it. Immutable; may be used from any thread."""

    __slots__ = ("_key", "_peer_id")

    def __init__(self, seed: bytes) -> None:
        """Derive the identity from a secret of 32 random bytes. Raises ValueError at any other length."""
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self._peer_id = _peer_id_of(self._key.public_key().public_bytes_raw())

    @property
    def peer_id(self) -> PeerId:
        """The peer id that other peers see, and that `verify` takes."""
        return self._peer_id

    def sign(self, data: bytes) -> bytes:
        """Return the 64-byte Ed25519 signature (RFC 8032) of `data`."""
        return self._key.sign(data)

    def encode(self) -> bytes:
        """Return the key as libp2p's `PrivateKey` protobuf, the content of an identity file. Secret."""
        return _PRIVATE_KEY_HEAD + self._key.private_bytes_raw() + self._key.public_key().public_bytes_raw()

    def __repr__(self) -> str:
        return f"Identity({self._peer_id})"


def create_identity() -> Identity:
    """Return a new random identity."""
    return Identity(os.urandom(SEED_BYTES))


def decode_identity(data: bytes) -> Identity:
    """Return the identity in libp2p's `PrivateKey` protobuf.

    Raises ValueError if it is anything but an Ed25519 key whose two halves belong together.
    """
    size = len(_PRIVATE_KEY_HEAD) + 2 * SEED_BYTES
    if len(data) != size or not data.startswith(_PRIVATE_KEY_HEAD):
        raise ValueError(f"not an Ed25519 key in libp2p's format ({size} bytes; it has {len(data)})")
    identity = Identity(data[len(_PRIVATE_KEY_HEAD) :][:SEED_BYTES])
    if identity.encode() != data:
        raise ValueError("the public half of the key does not belong to the private half")
    return identity


def load_identity(path: Path) -> Identity:
    """Return the identity in the file at `path`. Raises ConfigError if it is unreadable or no Ed25519 key."""
    try:
        data = path.read_bytes()
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"cannot read the identity file {path}: {error.strerror}") from error
    try:
        identity = decode_identity(data)
    except ValueError as error:
        raise ConfigError(
            f"the identity file {path} is unusable: {error}; name another file, and a new key is made there"
        ) from error
    if mode & 0o077:
        logger.warning("identity file %s can be read by other users: chmod 600 it peer=%s", path, identity.peer_id)
    return identity


def load_or_create_identity(path: Path) -> Identity:
    """Return the identity in the file at `path`; where there is no file, make a key and write it, mode 0600.

    Raises ConfigError if the file cannot be read or written, or holds something else.
    """
    identity = create_identity()
    try:
        # O_EXCL: of two processes that start at once, one writes and the other reads what it wrote.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return load_identity(path)
    except OSError as error:
        raise ConfigError(f"cannot write the identity file {path}: {error.strerror}") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(identity.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)  # half a key would be in the way of every later start
        raise ConfigError(f"cannot write the identity file {path}: {error.strerror}") from error
    return identity


def verify(peer_id: PeerId, data: bytes, signature: bytes) -> bool:
    """Whether `signature` of `data` was made with the key behind `peer_id`.

    False, too, for peer ids that do not contain their key (RSA) or are none at all: strangers' input may be passed in.
    """
    public_key = _public_key_in(peer_id)
    if public_key is None or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def has_key(peer_id: str) -> bool:
    """Whether a text is a peer id that contains its key, so that somebody can sign for it."""
    return _public_key_in(peer_id) is not None


def _peer_id_of(public_key: bytes) -> PeerId:
    return PeerId(base58.b58encode(_IDENTITY_MULTIHASH_HEAD + _PUBLIC_KEY_HEAD + public_key).decode())


def _public_key_in(peer_id: str) -> bytes | None:
    head = _IDENTITY_MULTIHASH_HEAD + _PUBLIC_KEY_HEAD
    if len(peer_id) > 64:  # base58 takes quadratic time; an Ed25519 peer id has 52 characters
        return None
    try:
        raw = base58.b58decode(peer_id)
    except ValueError:
        return None
    if len(raw) != len(head) + SEED_BYTES or not raw.startswith(head):
        return None
    return raw[len(head) :]
