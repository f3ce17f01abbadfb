"""What anybody finds of a swarm on the network in memory."""

from swarm_protocol.errors import InvalidRecordError
from swarm_protocol.identity import verify
from swarm_protocol.records import NodeRecord, directory_keys, unseal
from swarm_protocol.transport.memory_net import MemoryNetwork


def records_of(network: MemoryNetwork, num_blocks: int, model: str = "tiny-llama") -> list[NodeRecord]:
    """Return the records that have not expired."""
    found = []
    for key in directory_keys(model, num_blocks):
        for owner, (value, _) in network.records.get(key, {}).items():
            try:
                found.append(unseal(value, owner, verify, network.now_s()))
            except InvalidRecordError:
                continue
    return found
