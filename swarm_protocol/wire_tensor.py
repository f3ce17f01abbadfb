"""Pure: a tensor as it travels."""

from swarm_protocol.errors import InvalidTensorError
from swarm_protocol.transport.base import Buffer

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8}
"""The dtypes that travel, by torch's name, and their bytes per value."""

MAX_DIMENSIONS = 4


class WireTensor:
    """A tensor as it travels: row-major little-endian values; `dtype` is a key of `DTYPE_BYTES`. Never changed.

    A class of its own kind, not a dataclass, since the codec would read those by itself and its values are not a part
    of the header. Raises InvalidTensorError if the bytes are not as many as shape and dtype say.
    """

    __slots__ = ("data", "dtype", "shape")

    def __init__(self, dtype: str, shape: tuple[int, ...], data: Buffer) -> None:
        needed, found = tensor_bytes(dtype, shape), memoryview(data).nbytes
        if found != needed:
            raise InvalidTensorError(f"{dtype} of shape {shape} takes {needed} bytes, not {found}")
        self.dtype = dtype
        self.shape = shape
        self.data = data

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WireTensor):
            return NotImplemented
        return (self.dtype, self.shape, bytes(self.data)) == (other.dtype, other.shape, bytes(other.data))

    def __hash__(self) -> int:
        return hash((self.dtype, self.shape, bytes(self.data)))

    def __repr__(self) -> str:
        return f"WireTensor({self.dtype}, {self.shape})"


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes that a tensor takes on the wire. Raises InvalidTensorError if it cannot travel."""
    size = DTYPE_BYTES.get(dtype)
    if size is None:
        raise InvalidTensorError(f"dtype {dtype[:20]!r} does not travel; use one of {', '.join(DTYPE_BYTES)}")
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidTensorError(f"a tensor has at most {MAX_DIMENSIONS} dimensions, not {len(shape)}")
    for length in shape:
        if not 0 <= length < 1 << 31:
            raise InvalidTensorError("a dimension is 0 to 2^31 - 1")
        size *= length
    return size
