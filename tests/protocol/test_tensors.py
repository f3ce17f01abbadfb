"""Tensors on the wire keep their values, and are checked before anything is computed."""

import pytest
import torch

from swarm_protocol.errors import InvalidTensorError
from swarm_protocol.messages import DTYPE_BYTES, WireTensor
from swarm_protocol.tensors import check_finite, check_hidden_states, dtype_name, from_wire, to_wire


@pytest.mark.parametrize("name", sorted(DTYPE_BYTES))
@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 1, 8), (1, 0, 8), ()])
def test_a_tensor_keeps_its_values(name: str, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 100).to(getattr(torch, name))
    wired = to_wire(tensor)
    assert (wired.dtype, wired.shape) == (name, shape)
    arrived = from_wire(WireTensor(wired.dtype, wired.shape, bytes(wired.data)))
    assert arrived.dtype == tensor.dtype
    assert torch.equal(arrived, tensor)


def test_a_tensor_that_is_not_contiguous_travels_in_row_major_order() -> None:
    tensor = torch.arange(6.0).reshape(2, 3).t()
    assert torch.equal(from_wire(to_wire(tensor)), tensor)


def test_a_dtype_that_does_not_travel_is_named() -> None:
    with pytest.raises(InvalidTensorError, match="complex64"):
        dtype_name(torch.complex64)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("int64", (1, 2, 8)), ("float32", (2, 2, 8)), ("float32", (1, 2, 9)), ("float32", (2, 8)), ("float16", (1, 2, 8))],
)
def test_hidden_states_of_another_form_are_refused(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = to_wire(torch.zeros(shape, dtype=getattr(torch, dtype)))
    with pytest.raises(InvalidTensorError):
        check_hidden_states(tensor, frozenset({"float32"}), 1, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_values_are_finite_even_where_their_sum_is_not(dtype: torch.dtype) -> None:
    check_finite(torch.full((1, 2, 8), torch.finfo(dtype).max, dtype=dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    tensor = torch.zeros(1, 2, 8)
    check_finite(tensor)
    tensor[0, 1, 3] = value
    with pytest.raises(InvalidTensorError):
        check_finite(tensor)
