"""Cut spans and ends out of transformers' own classes, for any decoder-only family.

A span is the family's base model with the other blocks taken out and its edges made pass-throughs; the client's model
is the same model with one module in the place of its blocks. The whole model only ever exists on the meta device.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from swarm_protocol.errors import BlocksNotServedError, InvalidRequestError, MaxLengthError
from swarm_protocol.model.anatomy import (
    BlocksSlot,
    build_empty,
    find_anatomy,
    keep_blocks_only,
    probe_block_result,
    with_blocks,
    with_modules,
    with_path,
    without_edges,
)
from swarm_protocol.model.checkpoint import Checkpoint, Progress
from swarm_protocol.model.few_rows import speed_up
from swarm_protocol.model.tensor_loading import TensorLoader
from swarm_protocol.spans import Span


class SpanCache(Protocol):
    """What a span asks of the cache besides what transformers does: the position moves once, after the last block."""

    def advance(self, num_tokens: int) -> None: ...


def load_span(
    checkpoint: Checkpoint,
    span: Span,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    on_block: Callable[[nn.Module], None] | None = None,
    devices: Sequence[torch.device] = (),
) -> "SpanModule":
    """Return the blocks of `span` on `device`; no other tensor is read. `progress` counts blocks.

    `devices` are those of each block, if they are not all on one; the first one's is where hidden states enter.

    `on_block` is called with each block as soon as its weights are there, and may replace modules inside of it, so that
    only one block is in memory as it was. What it puts there has neither weights on the meta device nor buffers that
    are not persistent: those are made anew at the end.

    Raises UnsupportedFamilyError if the family cannot be cut, CheckpointError if tensors are missing or do not fit, and
    BlocksNotServedError if the model has no such blocks.
    """
    if span.end > checkpoint.num_blocks:
        raise BlocksNotServedError(span, Span(0, checkpoint.num_blocks))
    model = build_empty(checkpoint.config, dtype)
    anatomy = find_anatomy(model)
    weights = TensorLoader(checkpoint, model)
    keep_blocks_only(model, anatomy, span)
    weights.prepare(range(span.start, span.end))
    places = tuple(devices) or (device,) * len(span)
    device = places[0]
    for done, block in enumerate(range(span.start, span.end)):
        weights.load(model, places[done], block)
        if on_block:
            on_block(getattr(model.get_submodule(anatomy.decoder), anatomy.blocks)[block])
        if progress:
            progress(done + 1, len(span))
    weights.finish(model, device)
    decoder = model.get_submodule(anatomy.decoder)
    blocks = nn.ModuleList(list(getattr(decoder, anatomy.blocks))[span.start : span.end])
    setattr(decoder, anatomy.blocks, blocks)
    probe_block_result(decoder, anatomy, dtype, device)
    module = SpanModule(decoder, anatomy.blocks, span)
    if len(set(places)) > 1:
        module.place(places)
    return module


def build_client_model(
    checkpoint: Checkpoint,
    remote_blocks: nn.Module,
    *,
    dtype: torch.dtype,
    device: torch.device,
    model_class: type[PreTrainedModel] | None = None,
) -> PreTrainedModel:
    """Return the family's causal language model with `remote_blocks` in the place of its blocks.

    `remote_blocks` is called as `remote_blocks(hidden_states, past_key_values=…, position_ids=…)` with what the
    family's forward hands to a block (None where it hands nothing) and returns hidden states of the same shape.
    Padding is not passed on: a 2-D mask ends in the family's forward. `model_class` is another class of the family,
    such as one for sequence classification, whose head is made anew if the checkpoint lacks it. Raises as
    `load_span` does.
    """
    model = build_empty(checkpoint.config, dtype, model_class)
    anatomy = find_anatomy(model)
    weights = TensorLoader(checkpoint, model)
    decoder = model.get_submodule(anatomy.decoder)
    first = getattr(decoder, anatomy.blocks)[0]
    slot = BlocksSlot(remote_blocks, first)
    setattr(decoder, anatomy.blocks, nn.ModuleList())
    weights.prepare([None])
    weights.load(model, device, None)
    weights.finish(model, device, made_outside=anatomy.decoder if model_class else None)
    speed_up(model)  # the head; before the blocks are in, which are not this function's to change
    setattr(decoder, anatomy.blocks, nn.ModuleList([slot]))
    slot.returns_tuple = probe_block_result(without_edges(decoder, anatomy), anatomy, dtype, device)
    model.generation_config = checkpoint.generation_config()
    return model.eval()


def load_ends(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> "EndsModule":
    """Return the embeddings and the head. Raises as `load_span` does."""
    return EndsModule(build_client_model(checkpoint, nn.Identity(), dtype=dtype, device=device))


class SpanModule(nn.Module):
    """Blocks `span` of a model, in eval mode, without the model's edges."""

    def __init__(self, decoder: nn.Module, blocks_name: str, span: Span) -> None:
        super().__init__()
        self.decoder = decoder
        self.span = span
        self.config: PreTrainedConfig = decoder.config
        self._blocks_name = blocks_name
        self._loaded_on = next(self.parameters()).device
        # A dict hides the views from nn.Module: they share the decoder's modules and own none.
        self._views: dict[Span, nn.Module] = {}
        self._places: tuple[torch.device, ...] = ()
        self.eval()

    @property
    def num_blocks(self) -> int:
        return len(self.span)

    @property
    def blocks(self) -> nn.ModuleList:
        """The family's own blocks, first one first; whoever replaces a module inside them changes this span."""
        return getattr(self.decoder, self._blocks_name)  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that hidden states come and go in."""
        return self.config.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        # Norms may have no weights, and packed linear layers no parameters.
        parameter = next(self.parameters(), None)
        return self._loaded_on if parameter is None else parameter.device

    @property
    def places(self) -> tuple[torch.device, ...]:
        """The device of each block."""
        return self._places or (self.device,) * self.num_blocks

    def place(self, places: Sequence[torch.device]) -> None:
        """Let what a block is given travel to its device. Its weights are there already; once for each module."""
        self._places = tuple(places)
        for block, device in zip(self.blocks, places, strict=True):
            for module in block.modules():
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = buffer.to(device)
            block.register_forward_pre_hook(_Bringing(device), with_kwargs=True)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        cache: "SpanCache | None" = None,
        blocks: Span | None = None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Return the hidden states after `blocks`, or after all; shapes are (batch, seq, hidden).

        They are on the device of the last of these blocks. With a cache, the tokens follow those that it holds, and its
        position moves on at the end; without one they start at position 0. `position_ids` and `attention_mask` are for
        callers that batch sessions of different lengths and are passed on as they are. Raises BlocksNotServedError for
        blocks outside of this span.
        """
        extra: dict[str, Any] = {}
        if position_ids is not None:
            extra["position_ids"] = position_ids
        if attention_mask is not None:
            extra["attention_mask"] = attention_mask
        output = self._view(blocks or self.span)(
            inputs_embeds=hidden_states, past_key_values=cache, use_cache=cache is not None, return_dict=True, **extra
        )
        if cache is not None:
            cache.advance(hidden_states.shape[1])
        return output.last_hidden_state  # type: ignore[no-any-return]

    def config_of(self, blocks: Span) -> PreTrainedConfig:
        """Return the configuration that the base model reads when `blocks` run; the blocks have their own."""
        return self._view(blocks).config

    def _view(self, blocks: Span) -> nn.Module:
        view = self._views.get(blocks)
        if view is None:
            if not self.span.contains(blocks):
                raise BlocksNotServedError(blocks, self.span)
            part = Span(blocks.start - self.span.start, blocks.end - self.span.start)
            chosen = list(self.blocks)[part.start : part.end]
            view = self._views[blocks] = with_blocks(self.decoder, self._blocks_name, chosen, part)
        return view


class _Bringing:
    """Brings tensors among a block's arguments to its device, those in tuples and lists, too."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return self._brought(args), {name: self._brought(value) for name, value in kwargs.items()}

    def _brought(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(self._device)
        if type(value) in (tuple, list):
            return type(value)(self._brought(each) for each in value)
        return value


class EndsModule(nn.Module):
    """A model's embeddings and head, the weights shared with the model that it was made of. Any thread may call it."""

    def __init__(self, model: PreTrainedModel) -> None:
        """`model` is one that `build_client_model` made; it stays usable."""
        super().__init__()
        anatomy = find_anatomy(model, num_blocks=1)
        decoder = model.get_submodule(anatomy.decoder)
        slot = getattr(decoder, anatomy.blocks)[0]
        tap = BlocksSlot(_Tap(), slot)
        tap.returns_tuple = slot.returns_tuple
        decoder = with_modules(decoder, {anatomy.blocks: nn.ModuleList([tap])})
        self.model: Any = with_path(model, anatomy.decoder, decoder)
        self.config: PreTrainedConfig = model.config
        self._decoder_path = anatomy.decoder
        self._has_positions = anatomy.positions is not None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that hidden states come and go in."""
        return self.config.dtype  # type: ignore[no-any-return]

    def embed(self, input_ids: torch.Tensor, position: int | torch.Tensor = 0) -> torch.Tensor:
        """Return the hidden states (batch, seq, hidden) that enter the first block, for ids (batch, seq).

        `position` is that of the first token, or position ids (batch, seq); only learned positions depend on it.
        Raises MaxLengthError beyond the table of learned positions, InvalidRequestError for unknown ids.
        """
        self._check_ids(input_ids)
        extra = {"position_ids": self._position_ids(input_ids, position)} if self._has_positions else {}
        _tapped.injected, _tapped.seen = None, None
        self.model.get_submodule(self._decoder_path)(input_ids=input_ids, use_cache=False, return_dict=True, **extra)
        seen: torch.Tensor = _tapped.seen
        _tapped.seen = None
        return seen

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the logits (batch, seq, vocab) of hidden states (batch, seq, hidden) that left the last block."""
        _tapped.injected = hidden_states
        # The family's own forward runs around the tap, since heads scale and cap their logits in it.
        ids = torch.zeros(hidden_states.shape[:2], dtype=torch.long, device=hidden_states.device)
        try:
            return self.model(input_ids=ids, use_cache=False, return_dict=True).logits  # type: ignore[no-any-return]
        finally:
            _tapped.injected = _tapped.seen = None

    def last_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return what the head is given (batch, seq, hidden) of states that left the last block: the final norm's."""
        _tapped.injected = hidden_states
        ids = torch.zeros(hidden_states.shape[:2], dtype=torch.long, device=hidden_states.device)
        try:
            decoder = self.model.get_submodule(self._decoder_path)
            return decoder(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state  # type: ignore[no-any-return]
        finally:
            _tapped.injected = _tapped.seen = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The same as `logits`."""
        return self.logits(hidden_states)

    def _check_ids(self, input_ids: torch.Tensor) -> None:
        low, high = (int(bound) for bound in torch.aminmax(input_ids)) if input_ids.numel() else (0, 0)
        rows = self.model.get_input_embeddings().num_embeddings
        if low < 0 or high >= rows:
            raise InvalidRequestError(f"token ids are 0 to {rows - 1}, not {low if low < 0 else high}")

    def _position_ids(self, input_ids: torch.Tensor, position: int | torch.Tensor) -> torch.Tensor:
        if isinstance(position, int):
            ids = torch.arange(position, position + input_ids.shape[1], device=input_ids.device)[None]
        else:
            ids = position
        if ids.numel() and int(ids.max()) >= self.config.max_position_embeddings:
            raise MaxLengthError(int(ids.min()), input_ids.shape[1], self.config.max_position_embeddings)
        return ids


_tapped = threading.local()
"""What a thread's tap is to return (`injected`) and what it was given (`seen`)."""


class _Tap(nn.Module):
    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        _tapped.seen = hidden_states
        injected: torch.Tensor | None = _tapped.injected
        return hidden_states if injected is None else injected
