"""How a network runs the handlers of incoming streams: their errors end here, and their streams with them."""

import logging

from swarm_protocol.errors import StreamLostError
from swarm_protocol.transport.base import FrameStream, StreamHandler

logger = logging.getLogger(__name__)


async def run_handler(protocol: str, handler: StreamHandler, stream: FrameStream) -> None:
    """Run `handler` and close the stream. A failure is logged; the peer sees no more of it than the end."""
    try:
        await handler(stream)
    except StreamLostError:
        logger.debug("stream of %s lost peer=%s", protocol, stream.peer_id)
    except Exception:
        logger.exception("the handler of %s failed peer=%s", protocol, stream.peer_id)
    finally:
        await stream.close()
