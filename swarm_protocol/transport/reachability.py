"""Pure: what a peer's own addresses say about how others reach it.

libp2p asks other peers to dial back (AutoNAT). While they cannot, and a relay keeps a place for this peer, the peer's
addresses name that relay: `/ip4/…/tcp/…/p2p/RELAY/p2p-circuit`.
"""

import re
from collections.abc import Sequence

_RELAYED = re.compile(r"/p2p/([^/]+)/p2p-circuit")


def relays_in(addresses: Sequence[str]) -> tuple[str, ...]:
    """Return the peer ids of the relays through which a peer is reached; none where it is reached directly."""
    found = (_RELAYED.search(address) for address in addresses)
    return tuple(dict.fromkeys(match[1] for match in found if match is not None))


def change_in_words(before: Sequence[str], now: Sequence[str]) -> str | None:
    """Return what the owner should know if others reach this peer in another way than before; else None."""
    relays, earlier = relays_in(now), relays_in(before)
    if relays == earlier:
        return None
    if relays:
        names = ", ".join(relay[-8:] for relay in relays)
        return (
            f"not reachable directly: others reach this peer through the relay {names}, slower, and cut after half an "
            "hour; forward a port to it to change that"
        )
    return "not reached through a relay any more"


def unreachable_in_words(addresses: Sequence[str]) -> str:
    """Return what to say when nobody could reach this peer."""
    if relays_in(addresses):
        return "not reachable, neither directly nor through its relay"
    return "not reachable directly, and through no relay"
