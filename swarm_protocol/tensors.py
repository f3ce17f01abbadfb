"""Torch tensors to wire tensors and back."""

import math

import torch

from swarm_protocol.errors import InvalidTensorError
from swarm_protocol.messages import DTYPE_BYTES, WireTensor

_TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_BYTES}
_NAMES = {dtype: name for name, dtype in _TORCH_DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name under which `dtype` travels. Raises InvalidTensorError if it does not."""
    name = _NAMES.get(dtype)
    if name is None:
        raise InvalidTensorError(f"dtype {dtype} does not travel; use one of {', '.join(DTYPE_BYTES)}")
    return name


def to_wire(tensor: torch.Tensor) -> WireTensor:
    """Return `tensor` as it travels; a contiguous CPU tensor is not copied and must not be changed before it is sent.

    Raises InvalidTensorError for a dtype that does not travel.
    """
    name = dtype_name(tensor.dtype)
    flat = tensor.detach().contiguous().cpu().view(-1)
    return WireTensor(name, tuple(tensor.shape), flat.view(torch.uint8).numpy().data)


def from_wire(tensor: WireTensor) -> torch.Tensor:
    """Return the torch tensor on the CPU, with memory of its own."""
    dtype = _TORCH_DTYPES[tensor.dtype]
    if not memoryview(tensor.data).nbytes:
        return torch.empty(tensor.shape, dtype=dtype)
    # Frames are read-only and torch has no read-only tensors, hence the copy: 0.2 ms for 2 MB.
    return torch.frombuffer(bytearray(tensor.data), dtype=dtype).reshape(tensor.shape)


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
