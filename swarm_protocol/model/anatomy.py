"""Take transformers' causal language models apart: find the blocks and the edges, and put stand-ins in their places.

A stand-in shares every weight with the model that it was made of. Blocks keep the index and the configuration that
they were built with; only a base model, whose loop runs over its blocks, gets a configuration of those that are left.
"""

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, Cache, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from swarm_protocol.errors import UnsupportedFamilyError
from swarm_protocol.model import families
from swarm_protocol.spans import Span


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Where the parts of a causal language model are: `decoder` is the base model's path, `blocks` its list's name.

    `edges` are the base model's other children that work on hidden states or make them; `positions` is among them.
    """

    decoder: str
    blocks: str
    edges: tuple[str, ...]
    positions: str | None


class BlocksSlot(nn.Module):
    """Stands in the place of a model's blocks; hides how families call a block and what it returns."""

    def __init__(self, blocks: nn.Module, example: nn.Module) -> None:
        super().__init__()
        self.blocks = blocks
        self.returns_tuple = False
        # Some base models read what a block is, such as its attention type.
        for name, value in vars(example).items():
            if isinstance(value, str) and not name.startswith("_"):
                setattr(self, name, value)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor]:
        """Return what the family's own block would: a tensor, or a tuple that starts with it."""
        caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
        output = self.blocks(
            hidden_states,
            past_key_values=caches[0] if caches else None,
            position_ids=kwargs.get("position_ids"),
        )
        return (output,) if self.returns_tuple else output


class _PassThrough(nn.Module):
    """Stands for an edge that is not this part's: gives back what it is given first."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


class _NoPositions(nn.Module):
    """Stands for learned positions, which the client's ends have added."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._zero = torch.zeros((), dtype=dtype, device=device)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._zero


_building = threading.Lock()
"""While a model is built torch's initializers and its default dtype are others, in the whole process: of two threads
that build at once one would leave them so."""


def build_empty(
    config: PreTrainedConfig, dtype: torch.dtype, model_class: type[PreTrainedModel] | None = None
) -> PreTrainedModel:
    """Return the whole model on the meta device; None is the family's causal language model.

    Raises UnsupportedFamilyError if it cannot be built or the family does not fit.
    """
    families.check_config(config)
    model_class = model_class or MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    try:
        with _building, torch.device("meta"), no_init_weights():
            return model_class._from_config(copy.deepcopy(config), dtype=dtype)
    except (ImportError, LookupError, *families.CONFIG_ERRORS) as error:
        raise UnsupportedFamilyError(f"{config.model_type}: no model can be built of its config: {error}") from error


def find_anatomy(model: PreTrainedModel, num_blocks: int | None = None) -> Anatomy:
    """Return where the parts of `model` are. Raises UnsupportedFamilyError if it is not a plain chain of blocks."""
    config, family = model.config, model.config.model_type
    wanted = config.num_hidden_layers if num_blocks is None else num_blocks
    lists = [name for name, child in model.named_modules() if isinstance(child, nn.ModuleList) and len(child) == wanted]
    if not lists:
        raise UnsupportedFamilyError(f"{family} cannot be cut into spans: it has no list of {wanted} blocks")
    path, _, blocks = min(lists, key=lambda name: name.count(".")).rpartition(".")
    decoder = model.get_submodule(path)
    if not isinstance(decoder, PreTrainedModel):
        raise UnsupportedFamilyError(f"{family} cannot be cut into spans: its blocks are not called by a base model")
    if next(decoder.parameters(recurse=False), None) is not None:
        raise UnsupportedFamilyError(f"{family} cannot be cut into spans: its base model holds weights of its own")
    edges = tuple(name for name, child in decoder.named_children() if name != blocks and _is_edge(child))
    positions = families.traits_of(config).positions
    embeddings = model.get_input_embeddings()
    for name in edges:
        child = getattr(decoder, name)
        if isinstance(child, nn.Embedding) and child is not embeddings and name != positions:
            raise UnsupportedFamilyError(f"{family} cannot be cut into spans: nothing is known of its table {name}")
    return Anatomy(path, blocks, edges, positions if positions in edges else None)


def probe_block_result(decoder: nn.Module, anatomy: Anatomy, dtype: torch.dtype, device: torch.device) -> bool:
    """Run a base model whose edges pass through, with no blocks; return whether its blocks are to return tuples.

    Raises UnsupportedFamilyError if anything comes out but what went in: then something happens at the edges, or
    between blocks, that a span would do once more.
    """
    config: PreTrainedConfig = decoder.config
    # A generator of its own: whoever seeded torch's must not find it moved.
    probe = torch.rand(2, 3, config.hidden_size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    slot = BlocksSlot(_PassThrough(), next(iter(getattr(decoder, anatomy.blocks))))
    bare = with_blocks(decoder, anatomy.blocks, [slot], Span(0, 1)).eval()
    problem: Exception | None = None
    for slot.returns_tuple in (False, True):
        try:
            with torch.inference_mode():
                output = bare(inputs_embeds=probe, use_cache=False, return_dict=True).last_hidden_state
        except (LookupError, *families.CONFIG_ERRORS) as error:
            problem = error
            continue
        if isinstance(output, torch.Tensor) and torch.equal(output, probe):
            return slot.returns_tuple
    raise UnsupportedFamilyError(
        f"{config.model_type} cannot be cut into spans: its base model does more than to chain its blocks"
    ) from problem


def keep_blocks_only(model: PreTrainedModel, anatomy: Anatomy, span: Span) -> None:
    """Take everything but the span's blocks out of a whole model on the meta device, in place.

    The blocks stay at their places in the list, so that the checkpoint's names still lead to them.
    """
    holder: nn.Module = model
    for step in anatomy.decoder.split("."):
        for name, child in list(holder.named_children()):
            if name != step and _has_weights(child):
                setattr(holder, name, _PassThrough())
        holder = holder.get_submodule(step)
    blocks = getattr(holder, anatomy.blocks)
    for index in range(len(blocks)):
        if not span.start <= index < span.end:
            blocks[index] = nn.Identity()
    _neutralise(holder, anatomy)
    model.all_tied_weights_keys = {}
    holder.config = _config_of(holder.config, span)


def _neutralise(decoder: nn.Module, anatomy: Anatomy) -> None:
    dtype: torch.dtype = decoder.config.dtype  # type: ignore[assignment]
    for name in anatomy.edges:
        setattr(decoder, name, _PassThrough())
    if anatomy.positions:
        setattr(decoder, anatomy.positions, _NoPositions(dtype, torch.device("cpu")))
    for name, value in families.traits_of(decoder.config).neutral.items():
        setattr(decoder, name, value)


def without_edges(decoder: nn.Module, anatomy: Anatomy) -> nn.Module:
    """Return a copy of a base model whose edges pass through."""
    bare = with_modules(decoder, {})
    _neutralise(bare, anatomy)
    return bare


def _config_of(config: PreTrainedConfig, blocks: Span) -> PreTrainedConfig:
    """Return a copy of `config` for a base model that has only `blocks` of those that `config` counts."""
    part = copy.copy(config)
    for name, value in list(vars(config).items()):
        if name.endswith("layer_types") and isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(part, name, value[blocks.start : blocks.end])
    part.num_hidden_layers = len(blocks)
    return part


def _is_edge(module: nn.Module) -> bool:
    # Some norms have no weights; rotary embeddings, which belong to the blocks, have none either.
    return _has_weights(module) or "norm" in type(module).__name__.lower()


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def with_modules(module: nn.Module, replaced: Mapping[str, nn.Module]) -> nn.Module:
    """Return a copy of `module` that shares all weights and children but those in `replaced`."""
    view = copy.copy(module)
    view._modules = {**module._modules, **replaced}
    return view


def with_path(model: nn.Module, path: str, replacement: nn.Module) -> nn.Module:
    """Return a copy of `model` that shares all but the module at `path`, and the modules that hold that one."""
    first, _, rest = path.partition(".")
    child = replacement if not rest else with_path(model.get_submodule(first), rest, replacement)
    return with_modules(model, {first: child})


def with_blocks(decoder: nn.Module, name: str, blocks: Sequence[nn.Module], part: Span) -> nn.Module:
    """Return a copy of a base model that runs only `blocks`, which stand for `part` of the blocks that it has."""
    view = with_modules(decoder, {name: nn.ModuleList(blocks)})
    view.config = _config_of(decoder.config, part)
    return view
