"""Torch tensors to wire tensors and back."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from swarm_protocol.errors import InvalidTensorError
from swarm_protocol.int8_rows import are_rows_finite, decode_rows, encode_rows
from swarm_protocol.wire_tensor import DTYPE_BYTES, INT8_ROWS, WIRE_DTYPES, WireTensor, row_bytes

_TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_BYTES}
_NAMES = {dtype: name for name, dtype in _TORCH_DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name under which `dtype` travels. Raises InvalidTensorError if it does not."""
    name = _NAMES.get(dtype)
    if name is None:
        raise InvalidTensorError(f"dtype {dtype} does not travel; use one of {', '.join(WIRE_DTYPES)}")
    return name


def to_wire(tensor: torch.Tensor, dtype: str | None = None) -> WireTensor:
    """Return `tensor` as it travels, in its own dtype or as `dtype` of `WIRE_DTYPES`, made so on its device.

    A contiguous CPU tensor of that dtype is not copied and must not be changed before it is sent. Raises
    InvalidTensorError for a dtype that does not travel.
    """
    tensor = tensor.detach()
    if dtype == INT8_ROWS:
        return WireTensor(dtype, tuple(tensor.shape), _flat(encode_rows(tensor)) if tensor.numel() else b"")
    if dtype is not None:
        if dtype not in _TORCH_DTYPES:
            raise InvalidTensorError(f"dtype {dtype!r} does not travel; use one of {', '.join(WIRE_DTYPES)}")
        tensor = tensor.to(_TORCH_DTYPES[dtype])
    return WireTensor(dtype_name(tensor.dtype), tuple(tensor.shape), _flat(tensor))


def from_wire(tensor: WireTensor, device: torch.device | None = None) -> torch.Tensor:
    """Return the torch tensor on `device`, the CPU by default, with memory of its own; `INT8_ROWS` are float32.

    Raises InvalidTensorError for bytes that are no such tensor.
    """
    dtype = torch.float32 if tensor.dtype == INT8_ROWS else _TORCH_DTYPES[tensor.dtype]
    if not memoryview(tensor.data).nbytes:
        return torch.empty(tensor.shape, dtype=dtype, device=device)
    # Frames are read-only and torch has no read-only tensors, hence the copy: 0.2 ms for 2 MB.
    values = torch.frombuffer(bytearray(tensor.data), dtype=torch.uint8)
    if device is not None:
        values = values.to(device)
    if tensor.dtype == INT8_ROWS:
        return decode_rows(values.view(*tensor.shape[:-1], -1), tensor.shape[-1])
    return values.view(dtype).reshape(tensor.shape)


def token_part(states: WireTensor, start: int, end: int) -> WireTensor:
    """Return the tokens `[start, end)` of `states` (batch, seq, hidden), with the same memory if there is one row."""
    return _of_bytes(_token_bytes(states)[:, start:end], states)


def joined_tokens(parts: Sequence[WireTensor], row_orders: Sequence[Sequence[int]]) -> WireTensor:
    """Return the tokens of all `parts` (batch, seq, hidden), one or more, behind each other.

    Row i of a part is to be what its row `order[i]` is; with an empty order they stay as they are.
    """
    first = parts[0]
    if any(part.dtype != first.dtype for part in parts):
        values = [from_wire(part) for part in parts]
        ordered = [each[list(order)] if order else each for each, order in zip(values, row_orders, strict=True)]
        return to_wire(torch.cat(ordered, dim=1))
    rows = [_token_bytes(part) for part in parts]
    pieces = [each[list(order)] if order else each for each, order in zip(rows, row_orders, strict=True)]
    return _of_bytes(np.concatenate(pieces, axis=1), first)


def check_hidden_states(tensor: WireTensor, dtypes: frozenset[str], batch_size: int | None, hidden_size: int) -> None:
    """Raise InvalidTensorError unless `tensor` is (batch, seq, hidden) of one of `dtypes`.

    `batch_size` None lets any number of rows in. Values are checked by `check_finite`, once they are on the device.
    """
    if tensor.dtype not in dtypes:
        raise InvalidTensorError(f"hidden states of dtype {tensor.dtype}; {', '.join(sorted(dtypes))} are taken here")
    shape = tensor.shape
    if len(shape) != 3 or shape[2] != hidden_size or (batch_size is not None and shape[0] != batch_size):
        wanted = "any" if batch_size is None else batch_size
        raise InvalidTensorError(
            f"hidden states of shape {shape}; (batch {wanted}, seq, hidden {hidden_size}) is needed"
        )


def check_finite(hidden_states: torch.Tensor) -> None:
    """Raise InvalidTensorError if any value is infinite or not a number."""
    # A sum is finite only if every value is, and takes one pass; finite values may overflow in it: a second look tells.
    total = hidden_states.sum(dtype=torch.float32).item()
    if not math.isfinite(total) and not torch.isfinite(hidden_states).all():
        raise InvalidTensorError("hidden states hold values that are not finite")


def check_wire_finite(states: WireTensor) -> None:
    """Raise InvalidTensorError if any value of `states` (batch, seq, hidden) is infinite or not a number."""
    if states.dtype != INT8_ROWS:
        check_finite(from_wire(states))
    elif memoryview(states.data).nbytes and not are_rows_finite(_token_bytes(states), states.shape[2]):
        raise InvalidTensorError("hidden states hold values that are not finite")


def _token_bytes(states: WireTensor) -> npt.NDArray[np.uint8]:
    """Return the memory of `states` (batch, seq, hidden) as (batch, seq, row_bytes)."""
    batch_size, num_tokens, hidden_size = states.shape
    shape = (batch_size, num_tokens, row_bytes(states.dtype, hidden_size))
    return np.frombuffer(states.data, dtype=np.uint8).reshape(shape)


def _of_bytes(rows: npt.NDArray[np.uint8], like: WireTensor) -> WireTensor:
    whole = np.ascontiguousarray(rows)
    return WireTensor(like.dtype, (whole.shape[0], whole.shape[1], like.shape[2]), whole.data)


def _flat(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a tensor, row-major, on the CPU."""
    found: memoryview = tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().data
    return found
