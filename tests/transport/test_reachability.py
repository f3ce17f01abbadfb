"""What a peer tells its owner of how others reach it, and for whom it relays."""

from pathlib import Path

import pytest

from swarm_protocol.transport.network_config import NetworkConfig
from swarm_protocol.transport.p2p_daemon import DaemonFiles, _flags
from swarm_protocol.transport.reachability import DIRECT, UNREACHABLE, is_public, reached_in_words, relays_in

PUBLIC = "/ip4/8.8.8.8/tcp/31337/p2p/12D3KooWMe"
HOME = "/ip4/192.168.1.5/tcp/31337/p2p/12D3KooWMe"
LOCAL = "/ip4/127.0.0.1/tcp/31337/p2p/12D3KooWMe"
RELAYED = "/ip4/8.8.4.4/tcp/31337/p2p/12D3KooWRelayOne/p2p-circuit/p2p/12D3KooWMe"
OTHER = RELAYED.replace("RelayOne", "RelayTwo")


@pytest.mark.parametrize(
    ("addresses", "relays"),
    [
        ((), ()),
        ((PUBLIC,), ()),
        ((PUBLIC, RELAYED, RELAYED.replace("tcp", "udp")), ("12D3KooWRelayOne",)),
        ((RELAYED, OTHER), ("12D3KooWRelayOne", "12D3KooWRelayTwo")),
    ],
)
def test_relays_are_those_of_the_addresses(addresses: tuple[str, ...], relays: tuple[str, ...]) -> None:
    assert relays_in(addresses) == relays


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (PUBLIC, True), ("/dns4/first.example.org/tcp/1/p2p/a", True), ("/ip6/2606:4700::1111/tcp/1/p2p/a", True),
        (HOME, False), (LOCAL, False), ("/ip6/::1/tcp/1/p2p/a", False), ("/ip6/fe80::1/tcp/1/p2p/a", False),
        ("/ip4/what/tcp/1/p2p/a", False),
    ],
)  # fmt: skip
def test_public_addresses_are_those_of_the_internet(address: str, expected: bool) -> None:
    assert is_public(address) == expected


@pytest.mark.parametrize(
    ("addresses", "initial_peers", "words"),
    [
        ((LOCAL, HOME, PUBLIC), (PUBLIC,), DIRECT),
        ((LOCAL, HOME), (PUBLIC,), UNREACHABLE),
        ((), (PUBLIC,), UNREACHABLE),
        # A swarm of one machine or one network, or the first peer of one.
        ((LOCAL,), (LOCAL,), DIRECT),
        ((LOCAL, HOME), (HOME,), DIRECT),
        ((LOCAL, HOME), (), DIRECT),
        (
            (LOCAL, RELAYED, OTHER),
            (PUBLIC,),
            "not reachable directly: others come through the relay RelayOne, RelayTwo, slower, and cut after half an "
            "hour",
        ),
    ],
)
def test_the_owner_is_told_how_others_come(
    addresses: tuple[str, ...], initial_peers: tuple[str, ...], words: str
) -> None:
    assert reached_in_words(addresses, initial_peers) == words


@pytest.mark.parametrize(
    ("config", "relay", "uses_relays", "serves"),
    [
        (NetworkConfig(), 0, 0, 0),
        (NetworkConfig(relay=True), 1, 1, 0),
        (NetworkConfig(relay=True, client_mode=True), 1, 1, 0),
        (NetworkConfig(relay=True, relay_for_others=True), 1, 1, 1),
        (NetworkConfig(relay_for_others=True), 1, 0, 1),
    ],
)
def test_a_peer_relays_for_others_only_when_asked_to(
    config: NetworkConfig, relay: int, uses_relays: int, serves: int
) -> None:
    flags = _flags(config, [], DaemonFiles(Path("p2pd"), Path("identity"), Path("control")))
    assert {f"-relay={relay}", f"-autoRelay={uses_relays}", f"-relayService={serves}"} <= set(flags)
