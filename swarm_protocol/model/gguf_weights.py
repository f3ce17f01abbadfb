"""Read a GGUF file: configuration, tokenizer, and single tensors, dequantized when they are asked for.

Names, layouts and tokenizers are translated by transformers' own tables, so a family that it reads from GGUF is read
here, too; unlike its loader, only the wanted tensors are touched.
"""

import hashlib
import re
import struct
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from swarm_protocol.errors import CheckpointError, UnsupportedFamilyError
from swarm_protocol.model import families
from swarm_protocol.model.safetensors_files import DiskRoom, StoredTensor, samples

# GGUF files are named <model>-<encoding>.gguf or <model>.<encoding>.gguf by convention. The name inside the file is
# often left over from training ("Mix1-Ep2"), so people, and the swarm, go by the file's.
_ENCODING = re.compile(r"[.-](I?Q\d\w*|TQ\d\w*|MXFP4|BF16|F16|F32)$", re.IGNORECASE)

_transformers_reads = threading.Lock()
"""Held while transformers reads a file: for configurations it is given another reader than for tokenizers."""

_LONG_ARRAY = 4096
_TOKENS = "tokenizer.ggml.tokens"

_PLAIN_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class GgufCheckpoint:
    """One GGUF file. The file is mapped while tensors are read; each is dequantized to float32 alone."""

    path: Path
    name: str
    revision: str
    config: PreTrainedConfig

    @property
    def num_blocks(self) -> int:
        return int(self.config.num_hidden_layers)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrices where they are plain 16-bit, else float32: that is what dequantizing gives."""
        kinds = {tensor.tensor_type.name for tensor in self._reader.tensors if len(tensor.shape) > 1}
        return _PLAIN_DTYPES.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer with its chat template. Raises CheckpointError if transformers cannot convert it."""
        try:
            with _transformers_reads:
                return AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name, local_files_only=True)
        except (OSError, ValueError, KeyError, NotImplementedError) as error:
            raise CheckpointError(f"the tokenizer of {self.path.name} cannot be converted: {error}") from error

    def generation_config(self) -> GenerationConfig:
        return GenerationConfig.from_model_config(self.config)

    def weights(self, model: PreTrainedModel) -> Mapping[str, StoredTensor]:
        processor = TENSOR_PROCESSORS.get(self._architecture, TensorProcessor)(config=self.config.to_dict())
        try:
            names = get_gguf_hf_weights_map(_Names(model, model.config), processor)
        except NotImplementedError as error:
            raise CheckpointError(f"{self.path.name}: the tensor names of its architecture are unknown") from error
        pieces: dict[str, list[Any]] = defaultdict(list)
        for tensor in self._reader.tensors:
            # Merged experts are listed without the suffix that the file has.
            target = names.get(tensor.name) or names.get(tensor.name.removesuffix(".weight"))
            if target is not None:
                pieces[target].append(tensor)
        return {target: StoredTensor(_reading(processor, names, target, parts)) for target, parts in pieces.items()}

    def prepare(self, names: Collection[str]) -> None:
        """Do nothing: the file is here."""

    def disk_room(self, names: Collection[str]) -> DiskRoom | None:
        return None

    def are_here(self, names: Collection[str]) -> bool:
        return True

    def conversions(self, model: PreTrainedModel) -> list[Any]:
        return []

    @property
    def _architecture(self) -> str:
        """The file's own word, such as `qwen3moe` for what transformers calls `qwen3_moe`."""
        return str(self._reader.fields["general.architecture"].contents())

    @cached_property
    def _reader(self) -> gguf.GGUFReader:
        try:
            return _TensorReader(self.path)
        except (ValueError, IndexError, struct.error) as error:
            raise CheckpointError(f"{self.path.name} cannot be read as a GGUF file: {error}") from error


class _TensorReader(gguf.GGUFReader):  # type: ignore[misc]
    """The reader without the contents of arrays: those are vocabularies, which take it seconds and tell no tensors."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != gguf.GGUFValueType.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)  # type: ignore[no-any-return]
        item_type, length = struct.unpack_from("<IQ", self.data, orig_offs)
        size = struct.calcsize("<IQ")
        if item_type == gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)  # type: ignore[no-any-return]
        if item_type == gguf.GGUFValueType.STRING:
            for _ in range(length):
                size += 8 + struct.unpack_from("<Q", self.data, orig_offs + size)[0]
        else:
            size += length * np.dtype(self.gguf_scalar_to_np[gguf.GGUFValueType(item_type)]).itemsize
        return size, [], [], [gguf.GGUFValueType.ARRAY]


class _ConfigReader(_TensorReader):
    """The reader without the contents of long arrays, but with their lengths. What blocks have one of each is short."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type == gguf.GGUFValueType.ARRAY:
            length = self._get(orig_offs + 4, np.uint64)
            if length[0] > _LONG_ARRAY:
                size, _, indices, types = super()._get_field_parts(orig_offs, raw_type)
                return size, [length], indices, types
        return gguf.GGUFReader._get_field_parts(self, orig_offs, raw_type)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class _Names:
    """A model as the name map sees it, two levels deep: each level costs it 20 ms, and a model has hundreds of modules.

    The second level is for files that were made of a base model and lack its prefix.
    """

    module: nn.Module
    config: PreTrainedConfig
    is_root: bool = True

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.module.state_dict()

    def named_children(self) -> list[tuple[str, "_Names"]]:
        if not self.is_root:
            return []
        return [(name, _Names(child, self.config, False)) for name, child in self.module.named_children()]


def _reading(processor: Any, names: dict[str, str], target: str, parts: list[Any]) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        # Processors of merged experts put what they make here, two files' tensors into one.
        made: dict[str, Any] = {"tensors": {}, "config": processor.config}
        for part in parts:
            array = gguf.dequantize(part.data, part.tensor_type)
            result = processor.process(weights=array, name=part.name, tensor_key_mapping=names, parsed_parameters=made)
            if result.name is not None:
                made["tensors"][target] = torch.from_numpy(result.weights.copy())
        if target not in made["tensors"]:
            raise CheckpointError(f"the GGUF tensor {parts[0].name} cannot be turned into {target}")
        return made["tensors"][target]  # type: ignore[no-any-return]

    return read


def open_gguf(path: Path, clean_name: Callable[[str], str]) -> GgufCheckpoint:
    """Return the checkpoint in a GGUF file. Raises CheckpointError for a missing, damaged or unknown one."""
    if not path.is_file():
        raise CheckpointError(f"no such GGUF file: {path}")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path.name} is not a GGUF file")
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    for piece in samples(path, count=256):
        digest.update(piece)
    fields = _read_config(path)
    name = clean_name(_ENCODING.sub("", path.stem))
    try:
        config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    except (KeyError, *families.CONFIG_ERRORS) as error:
        raise UnsupportedFamilyError(
            f"{fields['model_type']}: the fields of {path.name} make no config: {error}"
        ) from error
    return GgufCheckpoint(path, name, digest.hexdigest()[:16], config)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        fields = _config_fields(path)
    except (ValueError, KeyError, IndexError, TypeError, OSError) as error:
        raise CheckpointError(f"{path.name} cannot be read as a GGUF file: {error}") from error
    model_type = fields.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(f"{path.name} holds the architecture {model_type!r}, which transformers does not know")
    return fields


def _config_fields(path: Path) -> dict[str, Any]:
    """Return what transformers makes of the file's configuration.

    Its own reader makes lists of all tokens and their merges first, in 3.4 s for 49,000 of them, of which only the
    number is asked for. So it gets a reader that leaves them out.
    """
    reader = _ConfigReader(path)
    with _transformers_reads:
        whole_reader, gguf.GGUFReader = gguf.GGUFReader, lambda _: reader
        try:
            fields = dict(load_gguf_checkpoint(str(path))["config"])
        finally:
            gguf.GGUFReader = whole_reader
    if not fields.get("vocab_size") and _TOKENS in reader.fields:
        fields["vocab_size"] = int(reader.fields[_TOKENS].parts[-1][0])
    return fields
