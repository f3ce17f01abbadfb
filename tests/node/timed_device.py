"""A node's device whose forwards take time of a virtual clock, as those of a small model on two cores do."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from swarm_protocol.transport.virtual_clock import EXTERNAL_LIMIT_S, VirtualClockLoop
from tests.node.node_scenario import GatedWorker, tiny_span

STEP_S = 0.05
"""What a forward takes however small it is: the weights are streamed once."""

TOKEN_S = 0.001
"""And for each row and token; 256 of them take 0.3 s, as 30 blocks of SmolLM2 do in float32."""


def forward_s(num_tokens: int, num_blocks: int = 3) -> float:
    """Return how long a forward of so many rows times tokens takes."""
    return (STEP_S + TOKEN_S * num_tokens) * num_blocks / 3


class TimedWorker(GatedWorker):
    """The real worker, thread and all, on a model whose forwards take `forward_s` of the running loop's time."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualClockLoop)
        self._virtual_loop = loop
        self.forwards: list[tuple[float, int, int]] = []
        """Of each forward the time at its start, its rows, and its tokens per row."""
        super().__init__(ThreadPoolExecutor(1), clock=loop.time)
        assert self._runner is not None
        _ = self._runner.batches.joining
        module = tiny_span()
        module.forward = self._timed(module.forward)  # type: ignore[method-assign]

    def close(self) -> None:
        """End the thread, and leave the model as it was, since tests share it."""
        del tiny_span().forward
        super().close()

    def _timed(self, forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def timed(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            num_rows, num_tokens, _ = hidden_states.shape
            self.forwards.append((self._virtual_loop.time(), num_rows, num_tokens))
            self._take(forward_s(num_rows * num_tokens, len(kwargs["blocks"])))
            return forward(hidden_states, **kwargs)

        return timed

    def _take(self, seconds: float) -> None:
        """Let so much time pass while the device thread waits. It holds the time otherwise."""
        done = threading.Event()
        self._virtual_loop.call_soon_threadsafe(self._let_pass, seconds, done)
        assert done.wait(EXTERNAL_LIMIT_S)

    def _let_pass(self, seconds: float, done: threading.Event) -> None:
        self._virtual_loop._num_holds -= 1
        self._virtual_loop.call_later(seconds, self._passed, done)

    def _passed(self, done: threading.Event) -> None:
        self._virtual_loop._num_holds += 1
        done.set()
