"""Read the records of a model's nodes."""

import logging

from swarm_protocol.errors import InvalidRecordError
from swarm_protocol.identity import verify
from swarm_protocol.ids import PeerId, short_peer
from swarm_protocol.records import NodeRecord, directory_keys, newest_records, unseal
from swarm_protocol.transport.base import Transport

logger = logging.getLogger(__name__)


async def read_records(transport: Transport, model: str, num_blocks: int) -> list[NodeRecord]:
    """Return the newest record of each node of the first `num_blocks` blocks of `model`.

    What is no record is passed over. The caller sets the deadline. Raises whatever happens below the directory.
    """
    found = await transport.directory.lookup(directory_keys(model, num_blocks))
    records = []
    for owner, value in ((owner, value) for values in found.values() for owner, value in values.items()):
        try:
            records.append(unseal(value, PeerId(owner), verify, transport.now_s()))
        except InvalidRecordError as error:
            logger.debug("record passed over: %s peer=%s", error, short_peer(PeerId(owner)))
    return newest_records(records)
