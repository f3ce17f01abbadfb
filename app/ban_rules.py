"""Pure: what a ban is on, and whether it meets somebody."""

import ipaddress
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from swarm_protocol.errors import ConfigError

KEY = re.compile(r"(uk|wk)_[0-9a-f]{4,40}")


@dataclass(frozen=True, slots=True)
class Ban:
    """`target` is a network in CIDR form or a key's id; `expires_at` None is never. Times are seconds since 1970."""

    target: str
    reason: str
    created_at: float
    expires_at: float | None


def ban_target(text: str) -> str:
    """Return what to ban in its one form: an address or network as CIDR, a key by its id. Raises ConfigError."""
    text = text.strip()
    if text.startswith(("uk_", "wk_")):
        key_id = "_".join(text.split("_")[:2])  # of a whole secret, its id
        if KEY.fullmatch(key_id):
            return key_id
    try:
        return str(_plain_network(ipaddress.ip_network(text, strict=False)))
    except ValueError:
        raise ConfigError(f"{text[:60]!r} is no address, no network such as 192.0.2.0/24 and no key's id") from None


def _plain_network(
    network: ipaddress.IPv4Network | ipaddress.IPv6Network,
) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """Return IPv4 in IPv6's clothes as what it is, as `address_of` does with addresses."""
    if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= 96:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.IPv4Network((int(mapped), network.prefixlen - 96))
    return network


def address_of(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return an address as the ban list knows it; None for what is none, as a Unix socket's."""
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return found if mapped is None else mapped


@dataclass(frozen=True, slots=True)
class BanList:
    """The bans that hold, for many look-ups: as many steps as there are lengths of prefixes, not bans."""

    keys: frozenset[str] = frozenset()
    networks: dict[tuple[int, int], frozenset[int]] = field(default_factory=dict)
    """By IP version and length of the prefix: the first addresses as numbers, without their zero bits."""

    def meets(self, address: str, key_ids: Collection[str | None] = ()) -> bool:
        """Return whether somebody with this address and these keys is banned."""
        if any(key_id in self.keys for key_id in key_ids if key_id is not None):
            return True
        found = address_of(address) if self.networks else None
        if found is None:
            return False
        number, bits = int(found), found.max_prefixlen
        return any(
            number >> (bits - length) in prefixes
            for (version, length), prefixes in self.networks.items()
            if version == found.version
        )


def ban_list(targets: Iterable[str]) -> BanList:
    """Return the list of these targets, each in the form that `ban_target` gives."""
    keys: set[str] = set()
    networks: dict[tuple[int, int], set[int]] = {}
    for target in targets:
        if KEY.fullmatch(target):
            keys.add(target)
            continue
        network = ipaddress.ip_network(target)
        prefix = int(network.network_address) >> (network.max_prefixlen - network.prefixlen)
        networks.setdefault((network.version, network.prefixlen), set()).add(prefix)
    return BanList(frozenset(keys), {form: frozenset(found) for form, found in networks.items()})
