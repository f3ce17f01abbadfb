"""What a peer tells its owner of how others reach it, and for whom it relays."""

from pathlib import Path

import pytest

from swarm_protocol.transport.network_config import NetworkConfig
from swarm_protocol.transport.p2p_daemon import DaemonFiles, _flags
from swarm_protocol.transport.reachability import change_in_words, relays_in, unreachable_in_words

DIRECT = "/ip4/203.0.113.5/tcp/31337/p2p/12D3KooWMe"
RELAYED = "/ip4/203.0.113.9/tcp/31337/p2p/12D3KooWRelayOne/p2p-circuit/p2p/12D3KooWMe"
OTHER = RELAYED.replace("RelayOne", "RelayTwo")


@pytest.mark.parametrize(
    ("addresses", "relays"),
    [
        ((), ()),
        ((DIRECT,), ()),
        ((DIRECT, RELAYED, RELAYED.replace("tcp", "udp")), ("12D3KooWRelayOne",)),
        ((RELAYED, OTHER), ("12D3KooWRelayOne", "12D3KooWRelayTwo")),
    ],
)
def test_relays_are_those_of_the_addresses(addresses: tuple[str, ...], relays: tuple[str, ...]) -> None:
    assert relays_in(addresses) == relays


def test_the_owner_is_told_when_others_come_through_a_relay_and_when_they_do_not_any_more() -> None:
    assert change_in_words((), (DIRECT,)) is None
    assert change_in_words((RELAYED,), (DIRECT, RELAYED)) is None
    told = change_in_words((DIRECT,), (RELAYED, OTHER))
    assert told is not None
    assert "not reachable directly: others reach this peer through the relay RelayOne, RelayTwo" in told
    assert change_in_words((RELAYED,), (DIRECT,)) == "not reached through a relay any more"


def test_a_peer_that_nobody_reaches_is_told_whether_it_has_a_relay() -> None:
    assert unreachable_in_words((DIRECT,)) == "not reachable directly, and through no relay"
    assert unreachable_in_words((RELAYED,)) == "not reachable, neither directly nor through its relay"


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
