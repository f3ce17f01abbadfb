"""Tell the owner again and again how the node is."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from server_node.admission import Admission
from server_node.announcer import Announcer
from server_node.speed import SpeedMeter
from server_node.status import REPORT_S, NodeStatus, TokenRate


@asynccontextmanager
async def reporting(
    admission: Admission, speed: SpeedMeter, announcer: Announcer, address: str, tell: Callable[[NodeStatus], None]
) -> AsyncIterator[None]:
    """Tell inside, every `REPORT_S`."""
    loop = asyncio.get_running_loop()
    since_s, rate = loop.time(), TokenRate(loop.time())

    async def report() -> None:
        while True:
            record, now_s = announcer.record, loop.time()
            tell(
                NodeStatus(
                    state=record.state,
                    model=record.model,
                    blocks=str(record.span),
                    peer_id=record.peer_id,
                    address=address,
                    sessions=admission.num_sessions,
                    tokens_per_s=round(rate.at(speed.num_tokens, now_s), 3),
                    cache_tokens=admission.served.cache_tokens,
                    free_tokens=admission.free_tokens,
                    uptime_s=round(now_s - since_s, 3),
                    software=record.software,
                )
            )
            await asyncio.sleep(REPORT_S)

    task = asyncio.create_task(report(), name="status")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
