"""A long input in pieces, several of which are on their way through the route at once.

While one node computes a piece, the one before it computes the next. Small pieces keep more nodes busy, but each costs
a trip: how large they are to be follows from what the first one took.
"""

import asyncio
import math
from collections.abc import Callable, Sequence

from swarm_client.leg import HopTiming, Leg, StepResult, own_copy
from swarm_protocol.messages import WireTensor

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


async def run_pieces(
    legs: Sequence[Leg],
    step_number: int,
    cut: Callable[[int, int], WireTensor],
    num_tokens: int,
    position: int,
    most: int,
) -> list[StepResult]:
    """Run `num_tokens` tokens from `position` on through `legs`; `cut(start, end)` gives their states.

    Raises an ExceptionGroup of the SwarmErrors that came up; the pieces may be anywhere then.
    """
    turns = [asyncio.Lock() for _ in legs]  # the pieces come to each leg in their order, and wait in it

    async def follow(states: WireTensor, timing: HopTiming, start: int) -> StepResult:
        outputs, timings = [states], [timing]
        for leg, turn in zip(legs[1:], turns[1:], strict=True):
            async with turn:
                leg.begin(step_number, states, start, None)
                states, timing = await leg.step(states, start, None, is_last=leg is legs[-1])
            outputs.append(states)
            timings.append(timing)
        return StepResult(tuple(outputs), tuple(timings))

    done, width = 0, min(FIRST_TOKENS, most)
    following: list[asyncio.Task[StepResult]] = []
    async with asyncio.TaskGroup() as group:
        while done < num_tokens:
            end = min(num_tokens, done + width)
            entering = own_copy(cut(done, end))
            legs[0].begin(step_number, entering, position + done, None)
            states, timing = await legs[0].step(entering, position + done, None, is_last=len(legs) == 1)
            following.append(group.create_task(follow(states, timing, position + done)))
            trip_s = max(0.0, timing.total_s - timing.compute_s - timing.queue_s)
            width = piece_tokens(num_tokens - end, len(legs), trip_s, timing.compute_s / (end - done), most)
            done = end
    return [task.result() for task in following]
