"""Wait for one of several things."""

import asyncio
from collections.abc import Awaitable

from swarm_protocol.errors import StreamLostError
from swarm_protocol.transport.base import Transport


async def comes_first(wanted: Awaitable[object], other: Awaitable[object]) -> bool:
    """Wait for the first of both and cancel the other; whether `wanted` has come. Raises what the first one raised."""
    tasks = [asyncio.ensure_future(wanted), asyncio.ensure_future(other)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
        return tasks[0].done()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def stopped_or_lost(stop: asyncio.Event, transport: Transport) -> None:
    """Wait until `stop` is set. Raises StreamLostError if the network is lost for good before."""
    if not await comes_first(stop.wait(), transport.until_lost()):
        raise StreamLostError("the network daemon ended; start the node again")
