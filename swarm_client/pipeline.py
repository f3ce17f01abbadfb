"""A long input in pieces, several of which are on their way through the route at once.

While one node computes a piece, the one before it computes the next. Small pieces keep more nodes busy, but each costs
a trip: how large they are to be follows from what the first one took.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence

from swarm_client.leg import Flight, HopTiming, StepResult
from swarm_protocol.messages import MAX_IN_FLIGHT

FIRST_TOKENS = 128
LEAST_TOKENS = 64
"""Of a piece. A CPU reads the weights once for so many tokens, and fewer take hardly less time."""


def piece_tokens(num_left: int, num_hops: int, trip_s: float, token_s: float, most: int) -> int:
    """Pure: return how many tokens the next pieces are to have, of `num_left`, for them to be through soonest.

    A piece of n tokens takes `trip_s + n * token_s` at a hop, and the last of k pieces is through after k + hops - 1
    such times.
    """
    if num_hops < 2 or token_s <= 0:
        return most
    best = math.sqrt(num_left * trip_s / ((num_hops - 1) * token_s))
    return min(most, max(LEAST_TOKENS, round(best)))


class Turns:
    """Keeps pieces in their order at each of `num_hops` hops, and says when one is through the first."""

    def __init__(self, num_hops: int) -> None:
        self.locks: Sequence[asyncio.Lock] = [asyncio.Lock() for _ in range(num_hops)]
        self.first_done: asyncio.Queue[HopTiming] = asyncio.Queue()

    def done(self, index: int, timing: HopTiming) -> None:
        """A piece is through the hop `index`."""
        if index == 0:
            self.first_done.put_nowait(timing)


async def fly_pieces(
    take_off: Callable[[int, int], Flight],
    fly: Callable[[Flight, Turns], Awaitable[StepResult]],
    landed: Callable[[Flight, StepResult], None],
    num_tokens: int,
    num_hops: int,
    most: int,
) -> None:
    """Let `num_tokens` tokens go round in pieces, of `most` tokens each at most; `landed` hears of each, in order.

    Raises an ExceptionGroup of the SwarmErrors that came up; the pieces that have not landed may be anywhere then.
    """
    turns = Turns(num_hops)
    room = asyncio.Semaphore(MAX_IN_FLIGHT)

    async def follow(flight: Flight) -> None:
        landed(flight, await fly(flight, turns))
        room.release()

    done, width = 0, min(FIRST_TOKENS, most)
    async with asyncio.TaskGroup() as group:
        while done < num_tokens:
            await room.acquire()
            end = min(num_tokens, done + width)
            group.create_task(follow(take_off(done, end)))
            timing = await turns.first_done.get()
            trip_s = max(0.0, timing.total_s - timing.compute_s - timing.queue_s)
            width = piece_tokens(num_tokens - end, num_hops, trip_s, timing.compute_s / (end - done), most)
            done = end
