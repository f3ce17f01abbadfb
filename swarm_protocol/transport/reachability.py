"""Pure: what a peer's own addresses say about how others reach it.

libp2p asks other peers to dial back (AutoNAT). While they cannot, a peer's public addresses are not among its own any
more; once a relay keeps a place for it, which takes some minutes, they name that relay:
`/ip4/…/tcp/…/p2p/RELAY/p2p-circuit`.
"""

import ipaddress
import re
from collections.abc import Sequence
from typing import Final

_RELAYED = re.compile(r"/p2p/([^/]+)/p2p-circuit")
_IP = re.compile(r"/ip[46]/([^/]+)/")

DIRECT: Final = "reachable directly"
UNREACHABLE: Final = "not reachable directly, and through no relay"


def relays_in(addresses: Sequence[str]) -> tuple[str, ...]:
    """Return the peer ids of the relays through which a peer is reached; none where it is reached directly."""
    found = (_RELAYED.search(address) for address in addresses)
    return tuple(dict.fromkeys(match[1] for match in found if match is not None))


def is_public(address: str) -> bool:
    """Whether an address is one of the internet; a name is taken for one."""
    found = _IP.match(address)
    try:
        return found is None or ipaddress.ip_address(found[1]).is_global
    except ValueError:
        return False


def reached_in_words(addresses: Sequence[str], initial_peers: Sequence[str]) -> str:
    """Return how others reach a peer with these addresses; in a swarm without public first peers, directly."""
    relays = relays_in(addresses)
    if relays:
        names = ", ".join(relay[-8:] for relay in relays)
        return f"not reachable directly: others come through the relay {names}, slower, and cut after half an hour"
    if any(map(is_public, addresses)) or not any(map(is_public, initial_peers)):
        return DIRECT
    return UNREACHABLE
