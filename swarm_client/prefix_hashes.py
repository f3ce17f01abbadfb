"""Pure: names for pages of tokens that sessions have in common, without telling nodes what the tokens are.

A page's hash covers every token up to its end and everything else that decides the hidden states which enter the hop:
model, revision, the dtype that travels, and the numerics of the hops before. It is keyed (BLAKE2b, RFC 7693) with a
secret of the client, so that a node cannot find out a text by trying likely ones. The nodes keep the keys and values of
such pages for the peer that filled them.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from swarm_client.routing.find_route import Hop, ModelKey
from swarm_protocol.ids import ID_BYTES
from swarm_protocol.messages import MAX_PREFIX_PAGES, PAGE_TOKENS

KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class TokenPrefix:
    """The tokens that a session of one row will begin with, and the dtype of the hidden states made of them."""

    token_ids: tuple[int, ...]
    dtype: str


def page_hashes(key: bytes, model: ModelKey, hops: Sequence[Hop], prefix: TokenPrefix) -> tuple[bytes, ...]:
    """Return the hashes of the full pages of `prefix` at the last of `hops`, which are those of a route up to there."""
    entering = [(hop.span.start, hop.span.end, hop.numerics) for hop in hops]
    digest = _digest(key, repr((model.name, model.revision, prefix.dtype, entering)).encode())
    hashes = []
    for page in range(min(len(prefix.token_ids) // PAGE_TOKENS, MAX_PREFIX_PAGES)):
        token_ids = prefix.token_ids[page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS]
        digest = _digest(key, digest + struct.pack(f"<{PAGE_TOKENS}q", *token_ids))
        hashes.append(digest)
    return tuple(hashes)


def _digest(key: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=ID_BYTES, key=key).digest()
