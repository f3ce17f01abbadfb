"""Read single tensors out of safetensors files, without mapping or reading anything else of them.

The format (github.com/huggingface/safetensors): 8 bytes little-endian header size, a JSON header naming each tensor's
dtype, shape and byte range, then the data. Files are read and not mapped, since pages of a mapping count as memory of
the process for as long as the mapping lives, next to the converted copies.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch

from swarm_protocol.errors import CheckpointError

# The reference implementation refuses bigger headers, too.
MAX_HEADER_BYTES = 100_000_000

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

    That loader reads from threads of its own. `prepare` does before what must not happen there: it fetches the file.
    """

    read: Callable[[], torch.Tensor]
    prepare: Callable[[], object] = lambda: None

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
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
            raise CheckpointError(f"{path.name} is not a safetensors file: its header would be {header_bytes} bytes")
        try:
            header = json.loads(file.read(header_bytes))
        except ValueError as error:
            raise CheckpointError(f"{path.name} is not a safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name} is not a safetensors file: its header is not an object")
    header.pop("__metadata__", None)
    start = 8 + header_bytes
    return {name: _entry(path, name, fields, start, file_bytes) for name, fields in header.items()}


def _entry(path: Path, name: str, fields: Any, start: int, file_bytes: int) -> TensorEntry:
    try:
        dtype = DTYPES[fields["dtype"]]
        shape = tuple(int(size) for size in fields["shape"])
        begin, end = (int(offset) for offset in fields["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path.name}: tensor {name!r} has an unreadable header entry") from error
    size_bytes = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or begin < 0 or end - begin != size_bytes or start + end > file_bytes:
        raise CheckpointError(f"{path.name}: tensor {name!r} does not lie inside the file, which may be cut short")
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
    return data.view(entry.dtype).reshape(entry.shape)


def samples(path: Path, count: int = 16, size_bytes: int = 4096) -> Iterator[bytes]:
    """Yield pieces spread over a file, the first and the last bytes included: enough to tell two trainings apart."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        for index in range(count):
            file.seek(max(0, file_bytes - size_bytes) * index // max(1, count - 1))
            yield file.read(size_bytes)
