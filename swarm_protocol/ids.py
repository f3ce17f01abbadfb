"""Pure: the identifiers that travel, and how they are written."""

import base64
import re
from typing import NewType

PeerId = NewType("PeerId", str)
"""A libp2p peer id in base58, `12D3KooW…` for the Ed25519 keys that Umbel makes."""

ID_BYTES = 16
"""Bytes of a session id and of a resume token: 128 random bits cannot be guessed."""

_PEER_ID = re.compile(r"[1-9A-HJ-NP-Za-km-z]{1,128}")
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


def parse_peer_id(text: str) -> PeerId:
    """Return `text` as a peer id. Raises ValueError if it is not base58 of a sensible length."""
    if not _PEER_ID.fullmatch(text):
        raise ValueError(f"not a peer id: {text[:140]!r}")
    return PeerId(text)


def peer_in(address: str) -> PeerId:
    """Return the peer that a multiaddress ends with, `…/p2p/12D3KooW…`. Raises ValueError if it ends with none."""
    return parse_peer_id(address.rpartition("/p2p/")[2])


def is_model_name(text: str) -> bool:
    """Whether `text` can name a model in records: up to 128 letters, digits and `._/-`."""
    return _MODEL_NAME.fullmatch(text) is not None


def short_peer(peer_id: PeerId) -> str:
    """Return the end of a peer id, enough to tell peers apart in logs."""
    return f"…{peer_id[-6:]}"


def short_id(identifier: bytes) -> str:
    """Return the start of a session id as text, enough to follow it through logs."""
    return base64.b16encode(identifier[:4]).decode().lower()
