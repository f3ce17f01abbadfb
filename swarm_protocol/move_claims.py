"""Pure: what nodes that want to take other blocks say in the directory, so that they do not all do so at once.

A claim is signed like a record and lives under

    umbel/1/<model name>/moves     subkey: the peer id     value: msgpack [payload, signature]

`server_node.move_turns` says when claims are made and whose counts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from swarm_protocol.ids import PeerId
from swarm_protocol.messages import Block, ShortText

MAX_CLAIM_BYTES = 500


@dataclass(frozen=True, slots=True)
class MoveClaim:
    """That node `peer_id` wants to give its blocks of a model up and take `[start_block, end_block)` in this round."""

    peer_id: ShortText
    start_block: Block
    end_block: Block
    round_number: Annotated[int, Meta(ge=0, le=(1 << 53))]
    revision: ShortText = ""
    expires_at_s: Annotated[float, Meta(ge=0)] = 0.0


def claims_key(model: str) -> str:
    """Return the directory key for claims of nodes of `model`."""
    return f"umbel/1/{model}/moves"


def seal_claim(claim: MoveClaim, sign: Callable[[bytes], bytes]) -> bytes:
    """Return the directory value of `claim`."""
    payload = msgspec.msgpack.encode(claim)
    return msgspec.msgpack.encode((payload, sign(payload)))


def claims_among(
    found: Mapping[str, bytes], verify: Callable[[PeerId, bytes, bytes], bool], now_s: float
) -> list[MoveClaim]:
    """Return the claims in what the directory holds by peer id; what is malformed, expired or forged is passed over."""
    claims = (_unsealed(value, PeerId(owner), verify) for owner, value in found.items())
    return [claim for claim in claims if claim is not None and claim.expires_at_s > now_s]


def _unsealed(value: bytes, owner: PeerId, verify: Callable[[PeerId, bytes, bytes], bool]) -> MoveClaim | None:
    if len(value) > MAX_CLAIM_BYTES:
        return None
    try:
        payload, signature = msgspec.msgpack.decode(value, type=tuple[bytes, bytes])
        claim = msgspec.msgpack.decode(payload, type=MoveClaim)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    return claim if claim.peer_id == owner and verify(owner, payload, signature) else None
