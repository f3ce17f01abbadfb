"""The rows of a session by their padding: each group has a session of its own at the nodes."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from swarm_client.prefix_hashes import TokenPrefix
from swarm_client.swarm_session import SwarmSession
from swarm_protocol.tensors import dtype_name, to_wire
from swarm_protocol.wire_tensor import WireTensor

T = TypeVar("T")


@dataclass(slots=True)
class RowGroup:
    """The rows that have the same number of left padding columns; they share one session, which knows no padding."""

    rows: list[int]
    padding: int
    session: SwarmSession

    def position(self, column: int) -> int:
        """The group's position that column `column` of the batch has."""
        return max(0, column - self.padding)

    def as_it_travels(self, hidden_states: torch.Tensor) -> WireTensor:
        """Return hidden states (batch, seq, hidden) in the dtype that the session's nodes get; it has to be open."""
        return to_wire(hidden_states, self.session.wire_dtype(dtype_name(hidden_states.dtype)))


async def all_of(jobs: Sequence[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
    """Run the jobs together and return their results; when one fails, raise that after all have ended."""
    if len(jobs) == 1:  # the usual case goes without tasks of its own
        return [await jobs[0]()]
    results = await asyncio.gather(*(job() for job in jobs), return_exceptions=True)
    done: list[T] = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        done.append(result)
    return done


async def open_together(
    sessions: Sequence[SwarmSession], num_tokens: Sequence[int], prefix: TokenPrefix | None
) -> list[int]:
    """Open all of them or none; return how many tokens of `prefix` each has."""
    opening = [
        partial(session.open, max(1, count), prefix) for session, count in zip(sessions, num_tokens, strict=True)
    ]
    try:
        return await all_of(opening)
    except BaseException:
        await close_together(sessions)
        raise


async def close_together(sessions: Sequence[SwarmSession]) -> None:
    """Close all of them."""
    await asyncio.gather(*(session.close() for session in sessions))
