"""The one module that stands in the place of a model's blocks and runs them in the swarm."""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache

from swarm_client.events import EventListener
from swarm_client.inference_session import InferenceSession
from swarm_client.remote_pass import RemotePass
from swarm_client.routing.find_route import ModelKey
from swarm_client.swarm import Swarm
from swarm_protocol.errors import InvalidRequestError


class RemoteCache(Cache):  # type: ignore[misc]
    """What transformers takes for a KV cache: it holds nothing and asks the session."""

    def __init__(self, session: InferenceSession) -> None:
        super().__init__(layers=[])
        self.session = session

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.session.position

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.session.position

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.session.position + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.session.max_length

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.session.reorder(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        self.session.position = self.session.position + tokens_to_remove  # transformers counts them below zero

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return True


@dataclass(slots=True)
class BlocksCall:
    """What a model's forward tells its remote blocks past the family's own forward, and what they tell back.

    `entering` and `span_outputs` are the states before the first block and after every span.
    """

    padding: Sequence[int] | None = None
    with_span_outputs: bool = False
    entering: torch.Tensor | None = None
    span_outputs: list[torch.Tensor] = field(default_factory=list)


_call: "contextvars.ContextVar[BlocksCall | None]" = contextvars.ContextVar("umbel_blocks_call", default=None)


@contextlib.contextmanager
def blocks_call(call: BlocksCall) -> Iterator[BlocksCall]:
    """Hand `call` to the remote blocks that run inside, in this thread."""
    token = _call.set(call)
    try:
        yield call
    finally:
        _call.reset(token)


class RemoteBlocks(nn.Module):
    """All blocks of a model, in the swarm."""

    def __init__(self, swarm: Swarm, model: ModelKey) -> None:
        super().__init__()
        self.swarm = swarm
        self.model = model
        swarm.watch(model)

    def session(
        self, max_length: int, on_event: EventListener | None = None, *, standby: bool | None = None
    ) -> InferenceSession:
        """Return a session for up to `max_length` tokens a row; the caches are reserved at its first step."""
        return InferenceSession(
            self.swarm.loop,
            self.swarm.config,
            lambda batch_size, length: self.swarm.session(self.model, batch_size, length, standby=standby),
            max_length,
            on_event,
        )

    def forward(self, hidden_states: torch.Tensor, past_key_values: Any = None, **_: Any) -> torch.Tensor:
        """Return the states after the last block: as a step of the session in `past_key_values`, or without a cache.

        Without one, gradients flow to `hidden_states`. Raises InvalidRequestError where they would have to through a
        session, SwarmError for what happens in the swarm.
        """
        call = _call.get() or BlocksCall()
        call.entering = hidden_states
        if isinstance(past_key_values, RemoteCache):
            if torch.is_grad_enabled() and hidden_states.requires_grad:
                raise InvalidRequestError(
                    "no gradients flow through a session: call the model outside of it, or under torch.no_grad()"
                )
            session = past_key_values.session
            output = session.step(hidden_states, padding=call.padding, with_span_outputs=call.with_span_outputs)
            call.span_outputs = list(session.span_outputs)
            return output
        return self._forward(hidden_states, call)

    def _forward(self, hidden_states: torch.Tensor, call: BlocksCall) -> torch.Tensor:
        padding = call.padding or [0] * hidden_states.shape[0]
        # Written in place, which autograd follows.
        output = torch.zeros_like(hidden_states)
        spans: list[torch.Tensor] = []
        for width in sorted(set(padding)):
            rows = [row for row, columns in enumerate(padding) if columns == width]
            whole = RemotePass(self.swarm, self.model, with_span_outputs=call.with_span_outputs)
            output[rows, width:] = whole.run(hidden_states[rows, width:])
            if len(spans) not in (0, len(whole.span_outputs)):
                raise InvalidRequestError("rows with different padding went through different spans; try again")
            spans = spans or [torch.zeros_like(hidden_states) for _ in whole.span_outputs]
            for span, part in zip(spans, whole.span_outputs, strict=True):
                span[rows, width:] = part
        call.span_outputs = spans
        return output


def left_padding(attention_mask: torch.Tensor | None, *, may_end_early: bool = False) -> list[int] | None:
    """Return the left padding columns of each row of a 2-D mask (batch, seq) of zeros and ones; None without a mask.

    With `may_end_early` a row may end with zeros: what stands there decides nothing that comes before. Raises
    InvalidRequestError for other masks: nodes know no holes.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise InvalidRequestError("the attention mask must be 2-D: (batch, seq) of zeros and ones")
    mask = attention_mask.cpu().bool()
    if may_end_early:
        is_behind = ~mask.flip(1).cummax(dim=1).values.flip(1)
        mask = mask | (is_behind & mask.any(dim=1, keepdim=True))
    if not torch.equal(mask, mask.cummax(dim=1).values) or not mask[:, -1:].all():
        raise InvalidRequestError("only left padding is served: the mask has zeros behind ones, or a row of zeros")
    return [int(columns) for columns in (~mask).sum(dim=1)]
