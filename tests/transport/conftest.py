"""The two networks, each as a pair of peers that have met."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from swarm_protocol.transport import Transport


@dataclass(frozen=True)
class Pair:
    """Two peers of one network. `first` is there before `second`, which joins by it."""

    first: Transport
    second: Transport


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=["memory", "paced", pytest.param("hivemind", marks=pytest.mark.p2p)]
)
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    if request.param != "hivemind":
        from server_node.paced_transport import paced
        from swarm_protocol.transport.memory_net import MemoryNetwork

        network = MemoryNetwork()
        bytes_per_s = 10**9 if request.param == "paced" else None
        peers = Pair(paced(network.transport(), bytes_per_s), paced(network.transport(), bytes_per_s))
    else:
        from swarm_protocol.transport.hivemind_net import NetworkConfig, open_transport

        first = await open_transport(NetworkConfig(host="127.0.0.1"))
        config = NetworkConfig(host="127.0.0.1", initial_peers=tuple(first.addresses), max_incoming_streams=300)
        peers = Pair(first, await open_transport(config))
    yield peers
    await peers.second.close()
    await peers.first.close()
