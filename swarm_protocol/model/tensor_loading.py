"""Fill a model on the meta device with a checkpoint's tensors, one block or the ends at a time.

Renaming, merging of experts and the computation of buffers are transformers' own, so whatever it loads is loaded the
same way here; the difference is that only the tensors of one block are in memory twice.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from swarm_protocol.errors import CheckpointError
from swarm_protocol.model.checkpoint import Checkpoint
from swarm_protocol.model.safetensors_files import DiskRoom, StoredTensor
from swarm_protocol.spans import Span, uncovered

_BLOCK_NUMBER = re.compile(r"\.(\d+)\.")
"""The first number in a tensor's name is its block's, for names of safetensors as for those of GGUF."""


class TensorLoader:
    """Loads a checkpoint's tensors into a model on the meta device, one block or the ends at a time."""

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        """`model` is still whole: its names are what the checkpoint's are translated to."""
        self._name = checkpoint.name
        self._checkpoint = checkpoint
        self._conversions = checkpoint.conversions(model)
        self._groups: dict[int | None, dict[str, StoredTensor]] = defaultdict(dict)
        for name, tensor in checkpoint.weights(model).items():
            number = _BLOCK_NUMBER.search(name)
            self._groups[int(number[1]) if number else None][name] = tensor
        self._missing: set[str] | None = None

    def prepare(self, blocks: Iterable[int | None]) -> None:
        """Have the tensors of these blocks, and of the ends for None, on this machine. Raises CheckpointError."""
        self._checkpoint.prepare(self._names(blocks))

    def disk_room(self, blocks: Iterable[int | None]) -> DiskRoom | None:
        """Return what `prepare` would need of the disk; None if all is here. Raises CheckpointError."""
        return self._checkpoint.disk_room(self._names(blocks))

    def spans_here(self, num_blocks: int) -> tuple[Span, ...]:
        """Return the longest runs of a model's blocks that are on this machine, as far as it knows by itself."""
        here = {block for block in range(num_blocks) if self._checkpoint.are_here(self._names([block]))}
        return tuple(
            uncovered((Span(block, block + 1) for block in range(num_blocks) if block not in here), num_blocks)
        )

    def _names(self, blocks: Iterable[int | None]) -> list[str]:
        return [name for block in blocks for tensor in self._groups[block].values() for name in tensor.names]

    def load(self, model: PreTrainedModel, device: torch.device, block: int | None) -> None:
        """Read the tensors of one block, or of the ends for None, into `model`."""
        dtype = model.config.dtype
        plan = LoadStateDictConfig(
            device_map={"": device},
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            weight_mapping=copy.deepcopy(self._conversions),
        )
        with _no_progress_bar():
            info, _ = convert_and_load_state_dict_in_model(model, self._groups[block], plan)
        if info.mismatched_keys:
            name, found, wanted = min(info.mismatched_keys)
            raise CheckpointError(f"{self._name}: {name} is {tuple(found)}, but its config wants {tuple(wanted)}")
        problems = [*info.error_msgs, *map(str, info.conversion_errors.values())]
        if problems:
            raise CheckpointError(f"{self._name} cannot be loaded: {problems[0]}")
        self._missing = info.missing_keys if self._missing is None else self._missing & info.missing_keys

    def finish(self, model: PreTrainedModel, device: torch.device, made_outside: str | None = None) -> None:
        """Compute what no file holds, tie what is tied. Raises CheckpointError if a tensor was in no file.

        Tensors outside of the module named `made_outside` are initialised anew instead.
        """
        missing = self._missing or set()
        made = {name for name in missing if made_outside and not name.startswith(f"{made_outside}.")}
        # The same three steps that end from_pretrained: buffers such as rotary frequencies are computed by the family.
        model._move_missing_keys_from_meta_to_device(made, {"": device}, None, None)
        for name in missing & set(model.all_tied_weights_keys):
            model.get_parameter(name)._is_hf_initialized = True
        model._initialize_missing_keys(False)
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
        on_meta = sorted(name for name, tensor in model.state_dict().items() if tensor.is_meta)
        if on_meta:
            raise CheckpointError(f"{self._name} is incomplete: {len(on_meta)} tensors lack, such as {on_meta[0]}")


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
