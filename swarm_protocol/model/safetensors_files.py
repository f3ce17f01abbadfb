"""Read single tensors out of safetensors files, without mapping or reading anything else of them.

The format (github.com/huggingface/safetensors): 8 bytes little-endian header size, a JSON header naming each tensor's
dtype, shape and byte range, then the data. Files are read and not mapped, since pages of a mapping count as memory of
the process for as long as the mapping lives, next to the converted copies.
"""

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any, Protocol

import torch

from swarm_protocol.errors import CheckpointError

# The reference implementation refuses bigger headers, too.
MAX_HEADER_BYTES = 100_000_000

HEADER_START = 8

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that is still on disk; `tensor[...]` reads it, which is what transformers' loader does, too.

    `names` are those that `Checkpoint.prepare` knows it by. That loader reads from threads of its own, where nothing
    should have to be downloaded any more.
    """

    read: Callable[[], torch.Tensor]
    names: tuple[str, ...] = ()

    def __getitem__(self, index: EllipsisType) -> torch.Tensor:
        return self.read()


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: byte offsets count from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a safetensors file by name. Raises CheckpointError if the file is not a sound one."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(header_size(path.name, file.read(HEADER_START), file_bytes))
    return parse_header(path.name, header, file_bytes)


def header_size(file_name: str, start: bytes, file_bytes: int) -> int:
    """Return the size of the header by a file's first bytes. Raises CheckpointError if it cannot be that size."""
    header_bytes = int.from_bytes(start, "little")
    if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes - HEADER_START):
        raise CheckpointError(f"{file_name} is not a safetensors file: its header would be {header_bytes} bytes")
    return header_bytes


def parse_header(file_name: str, header: bytes, file_bytes: int) -> dict[str, TensorEntry]:
    """Return the tensors by name that a header names. Raises CheckpointError if it is not a sound one."""
    try:
        fields = json.loads(header)
    except ValueError as error:
        raise CheckpointError(f"{file_name} is not a safetensors file: its header is not JSON") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file_name} is not a safetensors file: its header is not an object")
    fields.pop("__metadata__", None)
    start = HEADER_START + len(header)
    return {name: _entry(file_name, name, entry, start, file_bytes) for name, entry in fields.items()}


def _entry(file_name: str, name: str, fields: Any, start: int, file_bytes: int) -> TensorEntry:
    try:
        dtype = DTYPES[fields["dtype"]]
        shape = tuple(int(size) for size in fields["shape"])
        begin, end = (int(offset) for offset in fields["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file_name}: tensor {name!r} has an unreadable header entry") from error
    size_bytes = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or begin < 0 or end - begin != size_bytes or start + end > file_bytes:
        raise CheckpointError(f"{file_name}: tensor {name!r} does not lie inside the file, which may be cut short")
    return TensorEntry(dtype, shape, start + begin, size_bytes)


def read_tensor(path: Path, entry: TensorEntry) -> torch.Tensor:
    """Return the tensor in its stored dtype, on the CPU."""
    data = torch.empty(entry.size_bytes, dtype=torch.uint8)
    view = memoryview(data.numpy().data)
    with path.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        done = 0
        while done < entry.size_bytes:
            count = file.readinto(view[done:])
            if not count:
                raise CheckpointError(f"{path.name} ended while a tensor was read")
            done += count
    return tensor_of(data, entry)


def tensor_of(data: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    """Return the tensor that the bytes `data` are."""
    return data.view(entry.dtype).reshape(entry.shape)


@dataclass(frozen=True, slots=True)
class DiskRoom:
    """What tensors take on the disk, wherever they are now, and what they may take; `is_bounded` by the owner's word.

    What is there already counts in both.
    """

    needed_bytes: int
    room_bytes: int
    is_bounded: bool


class Shards(Protocol):
    """Where a checkpoint's safetensors files are. Any thread may read; one at a time may prepare."""

    def entries(self, file_name: str) -> Mapping[str, TensorEntry]:
        """Return the tensors of a file by name."""

    def prepare(self, wanted: Mapping[str, Sequence[TensorEntry]]) -> None:
        """Have the tensors of these files on this machine."""

    def disk_room(self, wanted: Mapping[str, Sequence[TensorEntry]]) -> DiskRoom | None:
        """Return what `prepare` would need of the disk; None if all is here."""

    def are_here(self, wanted: Mapping[str, Collection[str]]) -> bool:
        """Whether tensors, named by file, are on this machine, as far as it knows without asking anybody."""

    def read(self, file_name: str, entry: TensorEntry) -> torch.Tensor: ...


class LocalShards:
    """Files in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries: dict[str, dict[str, TensorEntry]] = {}

    def entries(self, file_name: str) -> Mapping[str, TensorEntry]:
        if file_name not in self._entries:
            self._entries[file_name] = read_header(self._folder / file_name)
        return self._entries[file_name]

    def prepare(self, wanted: Mapping[str, Sequence[TensorEntry]]) -> None:
        """Do nothing: they are here."""

    def disk_room(self, wanted: Mapping[str, Sequence[TensorEntry]]) -> DiskRoom | None:
        return None

    def are_here(self, wanted: Mapping[str, Collection[str]]) -> bool:
        return True

    def read(self, file_name: str, entry: TensorEntry) -> torch.Tensor:
        return read_tensor(self._folder / file_name, entry)


def samples(path: Path, count: int = 16, size_bytes: int = 4096) -> Iterator[bytes]:
    """Yield pieces spread over a file, the first and the last bytes included: enough to tell two trainings apart."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        for index in range(count):
            file.seek(max(0, file_bytes - size_bytes) * index // max(1, count - 1))
            yield file.read(size_bytes)
