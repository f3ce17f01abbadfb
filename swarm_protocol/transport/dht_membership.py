"""Becoming a member of the directory, and staying one though peers restart and machines sleep."""

import asyncio
import logging
import random
import statistics
import warnings
from collections.abc import Mapping

from swarm_protocol.errors import ConfigError
from swarm_protocol.ids import PeerId, short_peer
from swarm_protocol.transport.p2p_daemon import RETRY_S

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # as in hivemind_net.py
    from hivemind.dht.node import DHTNode
    from hivemind.p2p import P2P, PeerID
    from hivemind.proto import dht_pb2
    from hivemind.utils.multiaddr import Multiaddr
    from hivemind.utils.timed_storage import MAX_DHT_TIME_DISCREPANCY_SECONDS, get_dht_time

logger = logging.getLogger(__name__)

LOOK_S = 10.0
"""Between two looks whether the first peers are known; up to a quarter more or less, so that not all come at once."""

_CONNECT_S = 8.0
_NUM_REMEMBERED = 16
"""Other peers that are tried, too, when nobody is known any more: the first peers may be gone for good."""


_NUM_CLOCKS = 3
"""Peers whose clocks are compared with this machine's at each look: one of them may lie."""


async def join(node: DHTNode, peers: Mapping[PeerId, str]) -> None:
    """Get to know the peers of the directory, starting from `peers`. The caller sets the deadline.

    Done here and not by `DHTNode.create`, which leaves tasks behind and says neither who failed nor why.
    """
    while True:
        answers = await asyncio.gather(*(_ping(node, PeerID.from_base58(peer)) for peer in peers))
        offsets_s = [offset_s for offset_s in answers if offset_s is not None]
        if offsets_s:
            break
        await asyncio.sleep(RETRY_S)
    offset_s = statistics.median(offsets_s)
    if abs(offset_s) > MAX_DHT_TIME_DISCREPANCY_SECONDS:
        raise ConfigError(
            f"{_clock_words(offset_s)}, at most {MAX_DHT_TIME_DISCREPANCY_SECONDS} s are allowed; "
            "set it, or let NTP set it"
        )
    await node.find_nearest_nodes([node.node_id])


async def _ping(node: DHTNode, peer: PeerID) -> float | None:
    """Enter `peer` into the routing table; return how far its clock is ahead of ours, in s, or None if it is silent."""
    sent_s = get_dht_time()
    try:
        stub = node.protocol.get_stub(peer)
        request = dht_pb2.PingRequest(peer=node.protocol.node_info, validate=True)
        answer = await stub.rpc_ping(request, timeout=node.protocol.wait_timeout)
    except Exception as error:  # hivemind raises whatever happens below it
        logger.debug("no answer from initial peer: %r peer=%s", error, peer)
        return None
    received_s = get_dht_time()
    if not (node.protocol.client_mode or answer.available):
        logger.warning("initial peer cannot reach this one back: a firewall or NAT is in the way peer=%s", peer)
    peer_s = float(answer.dht_time)
    if await node.protocol.call_ping(peer) is None:
        return None
    offset_s: float = min(peer_s - sent_s, 0.0) + max(peer_s - received_s, 0.0)
    return offset_s


async def keep_joined(node: DHTNode, p2p: P2P, initial_peers: Mapping[PeerId, str]) -> None:
    """Look now and then whether the first peers are known, and join at those that are not, until cancelled.

    A peer that does not answer is forgotten, and nobody would ever ask it again: without this a first peer that was
    started anew would know none of the swarm, and the swarm not it.
    """
    addresses = {
        PeerID.from_base58(peer): [Multiaddr(address.rpartition("/p2p/")[0])]  # the daemon wants the peer apart
        for peer, address in initial_peers.items()
    }
    remembered: dict[PeerID, None] = {}
    was_alone = was_off = False
    while True:
        await asyncio.sleep(LOOK_S * random.uniform(0.75, 1.25))  # noqa: S311  # when to look is no secret
        try:
            known = node.protocol.routing_table.peer_id_to_uid
            remembered = dict.fromkeys([*known, *remembered][:_NUM_REMEMBERED])
            is_alone = not known
            if is_alone and not was_alone:
                logger.warning("no peer of the swarm answers any more: trying to find it again")
            was_alone = is_alone
            absent = [peer for peer in addresses if peer not in known]
            wanted = dict.fromkeys([*absent, *remembered] if is_alone else absent)
            found = await asyncio.gather(*(_rejoin(node, p2p, peer, addresses.get(peer, [])) for peer in wanted))
            if any(found):
                await node.find_nearest_nodes([node.node_id])
            was_off = await _compare_clocks(node, list(known), was_off)
        except Exception as error:  # hivemind raises whatever happens below it; the next look may go well
            logger.debug("could not look for first peers: %r", error)


async def _rejoin(node: DHTNode, p2p: P2P, peer: PeerID, addresses: list[Multiaddr]) -> bool:
    """Connect to a peer and enter it into the routing table, and this one into its own; whether that went well."""
    try:
        async with asyncio.timeout(_CONNECT_S):
            if addresses:
                await p2p._client.connect(peer, addresses)
            offset_s = await _ping(node, peer)
    except Exception as error:
        logger.debug("still no answer from a peer: %r peer=%s", error, peer)
        return False
    if offset_s is None:
        return False
    logger.info("found again peer=%s", short_peer(PeerId(peer.to_base58())))
    return True


async def _compare_clocks(node: DHTNode, peers: list[PeerID], was_off: bool) -> bool:
    """Say in the log, once, when this machine's clock has gone off the swarm's; return whether it is off."""
    asked = random.sample(peers, min(_NUM_CLOCKS, len(peers)))
    answers = await asyncio.gather(*(_ping(node, peer) for peer in asked))
    offsets_s = [offset_s for offset_s in answers if offset_s is not None]
    if not offsets_s:
        return was_off
    offset_s = statistics.median(offsets_s)
    is_off: bool = abs(offset_s) > MAX_DHT_TIME_DISCREPANCY_SECONDS
    if is_off and not was_off:
        logger.warning(
            "%s; others take this peer's records for expired, or refuse them: set it, or let NTP set it",
            _clock_words(offset_s),
        )
    elif was_off and not is_off:
        logger.info("the clock of this machine agrees with the swarm's again")
    return is_off


def _clock_words(offset_s: float) -> str:
    direction = "behind" if offset_s > 0 else "ahead of"
    return f"the clock of this machine is off: {abs(offset_s):.1f} s {direction} the swarm's"
