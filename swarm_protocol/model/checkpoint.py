"""Open a checkpoint: a folder of safetensors, a hub repository, or one GGUF file; say which tensor lies where.

Nothing is loaded here but the configuration and the headers. `parts.py` reads the tensors that a span or the ends need.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import get_model_conversion_mapping

from swarm_protocol.errors import CheckpointError, UnsupportedFamilyError
from swarm_protocol.model import families, gguf_weights, hub
from swarm_protocol.model.hub_shards import HubShards
from swarm_protocol.model.piece_cache import PieceCache
from swarm_protocol.model.safetensors_files import (
    DiskRoom,
    LocalShards,
    Shards,
    StoredTensor,
    TensorEntry,
    read_header,
    samples,
)

Progress = Callable[[int, int], None]
"""Called with what is done and how much there is in all."""

MAX_MODEL_NAME_CHARS = 128
"""As `ids.is_model_name` says; a record with a longer one is nobody's."""

_LONE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9._-]+)?")


class Checkpoint(Protocol):
    """A model's files. `config` is the text decoder's, without any dtype applied."""

    @property
    def config(self) -> PreTrainedConfig: ...
    @property
    def name(self) -> str:
        """The name in the swarm, of `[A-Za-z0-9._/-]`: of the folder, repository, or GGUF file without its encoding."""

    @property
    def revision(self) -> str:
        """16 hex digits that are equal for equal files, whatever their path."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that the weights are stored in; float32 where they are quantized GGUF."""

    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    def generation_config(self) -> GenerationConfig: ...
    def weights(self, model: PreTrainedModel) -> Mapping[str, StoredTensor]:
        """Return the tensors by their names in the files or in `model`, a whole model on the meta device."""

    def prepare(self, names: Collection[str]) -> None:
        """Have these tensors on this machine, by `StoredTensor.names`. Raises CheckpointError if one cannot be had."""

    def disk_room(self, names: Collection[str]) -> DiskRoom | None:
        """Return what `prepare` needs of the disk, None if nothing has to be downloaded. Raises CheckpointError."""

    def are_here(self, names: Collection[str]) -> bool:
        """Whether these tensors are on this machine, as far as it knows without asking anybody."""

    def conversions(self, model: PreTrainedModel) -> list[Any]:
        """Return transformers' renamings and mergers that lead from those names to `model`'s."""


def open_checkpoint(
    source: str,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    max_disk_bytes: int | None = None,
    progress: Progress | None = None,
    on_download: Progress | None = None,
) -> Checkpoint:
    """Return the checkpoint at `source`: a folder, a `*.gguf` file, or a hub repository id.

    `revision` and `cache_dir` are the hub's. `progress` counts the files that were examined. Of a hub repository's
    shards what a span needs is downloaded when it is loaded; `on_download` counts the bytes, and at most
    `max_disk_bytes` of pieces are kept. Raises CheckpointError if nothing usable is there, and UnsupportedFamilyError
    if the architecture cannot be served.
    """
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        return _open_gguf(path)
    if path.is_dir():
        lone = list(path.glob("*.gguf"))
        if len(lone) == 1 and not (path / "config.json").is_file():
            return _open_gguf(lone[0])
        return _open_folder(path, clean_name(path.resolve().name), progress)
    if not _REPO_ID.fullmatch(source):
        raise CheckpointError(f"no checkpoint at {source!r}: it is no folder, no .gguf file and no hub repository id")
    repository = hub.open_repository(source, revision=revision, cache_dir=cache_dir)
    cache = PieceCache(repository.pieces_folder, max_disk_bytes)
    return _open_hub(repository, HubShards(repository, cache, on_download), progress)


def clean_name(text: str) -> str:
    """Return `text` as a model's name: every run of characters outside `[A-Za-z0-9._/-]` is one dash, 128 in all."""
    return re.sub(r"[^A-Za-z0-9._/-]+", "-", text).lstrip("-/._")[:MAX_MODEL_NAME_CHARS].rstrip("-/.") or "model"


def _open_gguf(path: Path) -> Checkpoint:
    checkpoint = gguf_weights.open_gguf(path, clean_name)
    families.check_config(checkpoint.config)
    return checkpoint


@dataclass(frozen=True)
class SafetensorsCheckpoint:
    """Sharded or single safetensors, in a folder or in a hub repository whose small files are in `folder`."""

    folder: Path
    name: str
    revision: str
    config: PreTrainedConfig
    file_of: Mapping[str, str]
    shards: Shards
    quant_method: str | None

    @property
    def num_blocks(self) -> int:
        return int(self.config.num_hidden_layers)

    @cached_property
    def dtype(self) -> torch.dtype:
        dtype = getattr(self.config, "dtype", None)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            return dtype
        entries = self.shards.entries(next(iter(self.file_of.values()))).values()
        stored = [entry for entry in entries if entry.dtype.is_floating_point]
        return max(stored, key=lambda entry: entry.size_bytes).dtype if stored else torch.float32

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer. Raises CheckpointError if the folder has none that is read without its own code."""
        try:
            return AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self.name} has no usable tokenizer: {error}") from error

    def generation_config(self) -> GenerationConfig:
        if (self.folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(self.folder, local_files_only=True)
        return GenerationConfig.from_model_config(self.config)

    def weights(self, model: PreTrainedModel) -> Mapping[str, StoredTensor]:
        names = set(self.file_of)
        tensors = {name: self._stored(name) for name in names}
        if self.quant_method == "mxfp4":
            for blocks in [name for name in names if name.endswith("_blocks")]:
                scales = blocks.removesuffix("_blocks") + "_scales"
                tensors[blocks.removesuffix("_blocks")] = _unpacked(tensors.pop(blocks), tensors.pop(scales))
        return tensors

    def prepare(self, names: Collection[str]) -> None:
        self.shards.prepare(self._by_file(names))

    def disk_room(self, names: Collection[str]) -> DiskRoom | None:
        return self.shards.disk_room(self._by_file(names))

    def are_here(self, names: Collection[str]) -> bool:
        wanted: dict[str, list[str]] = defaultdict(list)
        for name in names:
            wanted[self.file_of[name]].append(name)
        return self.shards.are_here(wanted)

    def conversions(self, model: PreTrainedModel) -> list[Any]:
        return list(get_model_conversion_mapping(model))

    def _stored(self, name: str) -> StoredTensor:
        return StoredTensor(lambda: self.shards.read(self.file_of[name], self._entry(name)), (name,))

    def _by_file(self, names: Collection[str]) -> Mapping[str, Sequence[TensorEntry]]:
        wanted: dict[str, list[TensorEntry]] = defaultdict(list)
        for name in names:
            wanted[self.file_of[name]].append(self._entry(name))
        return wanted

    def _entry(self, name: str) -> TensorEntry:
        file_name = self.file_of[name]
        entry = self.shards.entries(file_name).get(name)
        if entry is None:
            raise CheckpointError(f"{file_name} of {self.name} lacks the tensor {name!r} that the index names")
        return entry


def _unpacked(blocks: StoredTensor, scales: StoredTensor) -> StoredTensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    # Packed 4-bit experts (OCP Microscaling) become plain bf16 weights, as transformers does where it lacks kernels.
    return StoredTensor(lambda: convert_moe_packed_tensors(blocks[...], scales[...]), (*blocks.names, *scales.names))


def _open_folder(folder: Path, name: str, progress: Progress | None) -> SafetensorsCheckpoint:
    config, quant_method = read_config(folder, name)
    index = _read_index(folder)
    paths = [_inside(folder, file) for file in sorted(set(index.values()))] if index else _lone_files(folder)
    file_of: dict[str, str] = {}
    digest = _config_digest(folder)
    for done, path in enumerate(paths):
        if not path.is_file():
            raise CheckpointError(f"{name} is incomplete: {path.name} is missing")
        file_of |= dict.fromkeys(read_header(path), path.name)
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        for piece in samples(path):
            digest.update(piece)
        if progress:
            progress(done + 1, len(paths))
    if index and (lacking := sorted(index.keys() - file_of.keys())):
        raise CheckpointError(f"{name} is incomplete: {len(lacking)} tensors of its index are in no file: {lacking[0]}")
    return SafetensorsCheckpoint(
        folder, name, digest.hexdigest()[:16], config, file_of, LocalShards(folder), quant_method
    )


def _open_hub(repository: hub.HubRepository, shards: Shards, progress: Progress | None) -> SafetensorsCheckpoint:
    config, quant_method = read_config(repository.folder, repository.repo_id)
    file_of = _read_index(repository.folder)
    if not file_of:
        file_of = dict.fromkeys(shards.entries(_LONE_FILE), _LONE_FILE)
    for file_name in set(file_of.values()):
        _inside(repository.folder, file_name)
    digest = _config_digest(repository.folder)
    # A commit names the content of every file, so no shard has to be here to tell two checkpoints apart.
    digest.update(repository.commit.encode())
    if progress:
        progress(1, 1)
    return SafetensorsCheckpoint(
        repository.folder,
        clean_name(repository.repo_id),
        digest.hexdigest()[:16],
        config,
        file_of,
        shards,
        quant_method,
    )


def read_config(folder: Path, name: str) -> tuple[PreTrainedConfig, str | None]:
    """Return a folder's configuration and how its weights are packed: None, or `mxfp4`, which is unpacked on loading.

    Raises CheckpointError if there is no readable configuration or the weights are quantized in another way,
    UnsupportedFamilyError if the architecture is unknown or does not fit.
    """
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{name} has no config.json, so it is no checkpoint") from error
    except ValueError as error:
        raise CheckpointError(f"the config.json of {name} is not JSON") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"the config.json of {name} is not an object")
    families.check_model_type(fields)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, KeyError, *families.CONFIG_ERRORS) as error:
        raise UnsupportedFamilyError(f"{fields['model_type']}: its config.json cannot be used: {error}") from error
    families.check_config(config)
    quantization = fields.get("quantization_config")
    if quantization is None:
        return config, None
    method = str(quantization.get("quant_method")) if isinstance(quantization, dict) else "an unknown method"
    if method != "mxfp4":
        raise CheckpointError(f"the weights of {name} are quantized with {method}: use the checkpoint they came from")
    # The model is built as if it had never been packed.
    del config.quantization_config
    return config, method


def _config_digest(folder: Path) -> Any:
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode())


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / _INDEX_FILE
    if not path.is_file():
        return {}
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in files.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{_INDEX_FILE} has no readable weight_map") from error


def _lone_files(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("*.safetensors"))
    if paths:
        # Some repositories hold the same weights twice, whole and in another layout.
        whole = [path for path in paths if path.name == _LONE_FILE]
        return whole or paths
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise CheckpointError(f"{folder.name} holds only pickled weights, which are never read: convert to safetensors")
    raise CheckpointError(f"{folder.name} holds no safetensors files")


def _inside(folder: Path, file_name: str) -> Path:
    if Path(file_name).name != file_name or not file_name.endswith(".safetensors"):
        raise CheckpointError(f"the index names {file_name!r}, which is no safetensors file beside it")
    return folder / file_name
