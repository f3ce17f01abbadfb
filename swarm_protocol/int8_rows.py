"""Hidden states in 8 bits: each row with a scale, and its largest values apart.

    row = int8 per value · bfloat16 scale · u16 places of the outliers · bfloat16 values of the outliers

A value is its byte times the scale; where an outlier is, the byte is 0. The residual stream of language models has a
few dimensions that are a hundred times larger than the rest, so that a scale that reached them would leave the rest two
or three bits: Dettmers et al. 2022 (LLM.int8(), arXiv 2208.07339) found them, and keep them apart in matrix products.
Measured with SmolLM2 (docs/performance.md): with one value in 80 apart the change of the next token's distribution is a
twelfth of that with a scale for each block of 64 values, which takes as many bytes.
"""

import numpy as np
import numpy.typing as npt
import torch

from swarm_protocol.errors import InvalidTensorError
from swarm_protocol.wire_tensor import INT8_ROWS, num_outliers

_MOST = 127.0
_BFLOAT16_EXPONENT = 0x7F80
"""All of its bits are set in what is infinite or not a number."""


def encode_rows(values: torch.Tensor) -> torch.Tensor:
    """Return floating `values` (…, n) as bytes (…, row_bytes), on their device. What is not finite stays so."""
    count = num_outliers(values.shape[-1])
    values = values.float()
    places = values.abs().topk(count, dim=-1).indices
    outliers = values.gather(-1, places).bfloat16()
    rest = values.scatter(-1, places, 0.0)
    scale = (rest.abs().amax(-1, keepdim=True) / _MOST).bfloat16()
    # A row of zeros has no scale, and one of NaN keeps it, which tells the receiver.
    divisor = torch.where(scale == 0, 1.0, scale.float())
    levels = (rest / divisor).round_().clamp_(-_MOST, _MOST).nan_to_num_().to(torch.int8)
    low = (places & 0xFF).to(torch.uint8)
    high = (places >> 8).to(torch.uint8)
    parts = (
        levels.view(torch.uint8),
        scale.view(torch.uint8),
        torch.stack((low, high), dim=-1).flatten(-2),
        outliers.view(torch.uint8),
    )
    return torch.cat(parts, dim=-1)


def decode_rows(rows: torch.Tensor, length: int) -> torch.Tensor:
    """Return the float32 values (…, length) of bytes (…, row_bytes), on their device.

    Raises InvalidTensorError if an outlier is outside its row.
    """
    count = num_outliers(length)
    levels, scale, places, outliers = torch.split(rows, [length, 2, 2 * count, 2 * count], dim=-1)
    values = levels.view(torch.int8).float() * _as_bfloat16(scale).float()
    if count:
        pairs = places.reshape(*places.shape[:-1], count, 2).long()
        indices = pairs[..., 0] | pairs[..., 1] << 8
        if indices.numel() and int(indices.max()) >= length:
            raise InvalidTensorError(f"an outlier of {INT8_ROWS} is outside its row of {length} values")
        values.scatter_(-1, indices, _as_bfloat16(outliers).float())
    return values


def are_rows_finite(rows: npt.NDArray[np.uint8], length: int) -> bool:
    """Return whether every value of the bytes (…, row_bytes) is finite; a fiftieth of them tells."""
    tail = rows[..., length:]
    numbers = np.concatenate((tail[..., :2], tail[..., 2 + 2 * num_outliers(length) :]), axis=-1).view("<u2")
    return not bool(((numbers & _BFLOAT16_EXPONENT) == _BFLOAT16_EXPONENT).any())


def _as_bfloat16(values: torch.Tensor) -> torch.Tensor:
    # A view in another dtype has to begin, and to step, at whole numbers of its values.
    return values.clone(memory_format=torch.contiguous_format).view(torch.bfloat16)
