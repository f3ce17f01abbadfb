"""Pure: a tensor as it travels."""

import math

from swarm_protocol.errors import InvalidTensorError
from swarm_protocol.transport.base import Buffer

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8}
"""The dtypes that travel as they are, by torch's name, and their bytes per value."""

INT8_ROWS = "int8_rows"
"""Rows along the last dimension in 8 bits, with a scale each, and their largest values beside them: see `int8_rows.py`.

One value in `VALUES_PER_OUTLIER` is such a one; it takes 4 bytes more, the scale 2. Of a row of 576 values that is 606
bytes, 1.90 times less than bfloat16's 1,152, and so for every longer one.
"""

VALUES_PER_OUTLIER = 80
MAX_INT8_ROW = 1 << 16
"""Values: an outlier's place takes 16 bits."""

WIRE_DTYPES = (*DTYPE_BYTES, INT8_ROWS)
"""Everything that travels."""

MAX_DIMENSIONS = 4


class WireTensor:
    """A tensor as it travels: row-major little-endian values; `dtype` is one of `WIRE_DTYPES`. Never changed.

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


def own_copy(tensor: WireTensor) -> WireTensor:
    """Return `tensor` with memory of its own: that of a frame is larger, that of a caller's may be changed."""
    return WireTensor(tensor.dtype, tensor.shape, bytes(tensor.data))


def num_outliers(length: int) -> int:
    """Return how many values of a row of `length` travel beside the others as `INT8_ROWS`."""
    return length // VALUES_PER_OUTLIER


def row_bytes(dtype: str, length: int) -> int:
    """Return the bytes that `length` values along the last dimension take. Raises InvalidTensorError for no dtype."""
    if dtype == INT8_ROWS:
        if not 0 < length <= MAX_INT8_ROW:
            raise InvalidTensorError(f"{INT8_ROWS} has rows of 1 to {MAX_INT8_ROW} values, not {length}")
        return length + 2 + 4 * num_outliers(length)
    size = DTYPE_BYTES.get(dtype)
    if size is None:
        raise InvalidTensorError(f"dtype {dtype[:20]!r} does not travel; use one of {', '.join(WIRE_DTYPES)}")
    return size * length


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes that a tensor takes on the wire. Raises InvalidTensorError if it cannot travel."""
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidTensorError(f"a tensor has at most {MAX_DIMENSIONS} dimensions, not {len(shape)}")
    for length in shape:
        if not 0 <= length < 1 << 31:
            raise InvalidTensorError("a dimension is 0 to 2^31 - 1")
    if not shape:
        return row_bytes(dtype, 1)
    return math.prod(shape[:-1]) * row_bytes(dtype, shape[-1])
