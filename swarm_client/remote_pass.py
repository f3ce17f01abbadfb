"""One forward pass of a batch through the swarm, which autograd can go back through."""

from collections.abc import Sequence
from typing import Any

import torch

from swarm_client.passes import Visit
from swarm_client.routing.find_route import ModelKey
from swarm_client.swarm import Swarm
from swarm_protocol.tensors import check_wire_finite, from_wire, to_wire


class RemotePass:
    """All blocks of a model, run once over some rows in micro-batches of `ClientConfig.step_tokens` tokens."""

    def __init__(self, swarm: Swarm, model: ModelKey, *, with_span_outputs: bool = False) -> None:
        """`with_span_outputs` keeps the states after every span, through which no gradients flow."""
        self.span_outputs: list[torch.Tensor] = []
        self._swarm = swarm
        self._model = model
        self._with_span_outputs = with_span_outputs
        self._num_rows = 1
        self._passed: Sequence[Sequence[Visit]] = ()

    def run(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the states (batch, seq, hidden) after the last block. Raises SwarmError."""
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            output: torch.Tensor = _Differentiable.apply(hidden_states, self)  # type: ignore[no-untyped-call]
            return output
        output = self.forward(hidden_states)
        self._passed = ()
        return output

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Run the batch and keep what `backward` needs."""
        self._num_rows = max(1, self._swarm.config.step_tokens // max(1, hidden_states.shape[1]))
        pieces = [to_wire(piece) for piece in torch.split(hidden_states, self._num_rows)]
        passed = self._swarm.forward(self._model, pieces, is_one_route=self._with_span_outputs)
        for visits in passed:
            check_wire_finite(visits[-1].output)
        if self._with_span_outputs and len({tuple(visit.hop.span for visit in visits) for visits in passed}) == 1:
            for parts in zip(*passed, strict=True):
                whole = torch.cat([from_wire(visit.output) for visit in parts])
                self.span_outputs.append(whole.to(hidden_states.device))
        self._passed = passed
        return torch.cat([from_wire(visits[-1].output) for visits in passed]).to(hidden_states.device)

    def backward(self, gradients: torch.Tensor) -> torch.Tensor:
        """Return the gradients of what `forward` was given, for those of its output. Raises SwarmError."""
        pieces = [to_wire(piece) for piece in torch.split(gradients, self._num_rows)]
        found = self._swarm.backward(self._model, self._passed, pieces)
        return torch.cat([from_wire(piece) for piece in found]).to(gradients.device)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, whole: RemotePass) -> torch.Tensor:
        ctx.whole = whole
        return whole.forward(hidden_states)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.whole.backward(gradients), None
