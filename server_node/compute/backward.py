"""A backward pass through some blocks, in pieces that others' decode steps can come between.

Forward through all blocks but the last, keeping what goes into each; then from the last to the first each block runs
again, with what autograd needs of it, and gives its gradients to the one before. So the memory is one block's, and a
state for each other block; that costs a second forward pass (Chen et al. 2016, arXiv 1604.06174).
"""

import torch

from server_node.compute.block_runner import BlockRunner
from swarm_protocol.spans import Span

BACK_COST = 3
"""What a block costs on the way back, in its forward passes: one, and about two for its gradients."""


def backward_cost(num_blocks: int) -> int:
    """Return what a whole pass costs, in forward passes of a block."""
    return num_blocks - 1 + BACK_COST * num_blocks


class BackwardPass:
    """One pass on its way. Only the compute thread uses it."""

    def __init__(self, runner: BlockRunner, blocks: Span, hidden_states: torch.Tensor, gradients: torch.Tensor) -> None:
        """Both are (batch, seq, hidden), in the dtype and on the device of the blocks.

        Raises InvalidTensorError and BlocksNotServedError.
        """
        runner.check(hidden_states, blocks)
        self._runner = runner
        self._blocks = blocks
        # Autograd takes no tensors that were made in inference mode, as what comes here was; copies are made outside.
        with torch.inference_mode(False):
            self._entering = [hidden_states.clone()]
            self._gradients = gradients.clone()
        self._next_back = blocks.end - 1

    @property
    def gradients(self) -> torch.Tensor:
        """Those of what entered the first block, once the pass is through."""
        return self._gradients

    def run(self, most: int) -> int:
        """Run a part that costs about `most` forward passes of a block, at least one block; return what it cost."""
        cost = 0
        while self._entering and (not cost or cost + self._next_cost <= most):
            cost += self._next_cost
            with torch.inference_mode(False):
                if self._is_forward:
                    self._run_forward()
                else:
                    self._run_back()
        return cost

    @property
    def _is_forward(self) -> bool:
        return self._next_back == self._blocks.end - 1 and len(self._entering) < len(self._blocks)

    @property
    def _next_cost(self) -> int:
        return 1 if self._is_forward else BACK_COST

    def _run_forward(self) -> None:
        block = self._blocks.start + len(self._entering) - 1
        with torch.no_grad():
            self._entering.append(self._runner.module(self._entering[-1], blocks=Span(block, block + 1)))

    def _run_back(self) -> None:
        block = self._next_back
        entering = self._entering.pop().detach().requires_grad_()
        with torch.enable_grad():
            output = self._runner.module(entering, blocks=Span(block, block + 1))
            gradients = self._gradients.to(output.device)
            (found,) = torch.autograd.grad(output, entering, gradients)
        self._gradients = found
        self._next_back -= 1
