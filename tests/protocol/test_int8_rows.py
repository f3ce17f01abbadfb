"""Rows in 8 bits lose little, whatever their outliers, and bad bytes are found out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm_protocol.errors import InvalidTensorError
from swarm_protocol.int8_rows import decode_rows, encode_rows
from swarm_protocol.tensors import check_wire_finite, from_wire, joined_tokens, to_wire, token_part
from swarm_protocol.wire_tensor import INT8_ROWS, MAX_INT8_ROW, WireTensor, num_outliers, tensor_bytes


def random_states(*shape: int, seed: int = 0) -> torch.Tensor:
    """Hidden states with a few dimensions that are a hundred times the others, as models have them."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(*shape, generator=generator)
    states[..., :: max(1, shape[-1] // 3)] *= 100
    return states


@pytest.mark.parametrize("hidden_size", [576, 768, 1024, 2048, 4096, 8192, 14336, 16384])
def test_rows_take_1_9_times_fewer_bytes_than_bfloat16(hidden_size: int) -> None:
    shape = (1, 7, hidden_size)
    assert tensor_bytes("bfloat16", shape) >= 1.9 * tensor_bytes(INT8_ROWS, shape)
    assert memoryview(to_wire(random_states(*shape), INT8_ROWS).data).nbytes == tensor_bytes(INT8_ROWS, shape)


@pytest.mark.parametrize("shape", [(1, 1, 576), (2, 5, 80), (3, 2, 79), (1, 4, 4096), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_value_is_off_by_half_a_level_of_its_row_at_most(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    states = random_states(*shape).to(dtype)
    found = from_wire(to_wire(states, INT8_ROWS))
    assert found.dtype == torch.float32
    count = num_outliers(shape[-1])
    sizes = states.float().abs()
    largest_left = sizes.sort(-1, descending=True).values[..., count : count + 1]
    # What is apart is as exact as bfloat16; the scale is rounded to bfloat16, so a level may be 1/256 larger.
    allowed = torch.where(sizes > largest_left, sizes / 256, largest_left / 127 * 0.51 + largest_left / 256)
    assert bool(((found - states.float()).abs() <= allowed).all())


def test_outliers_leave_the_rest_its_bits() -> None:
    plain = torch.randn(1, 1, 800, generator=torch.Generator().manual_seed(1))
    with_outliers = plain.clone()
    with_outliers[..., 3::160] = 5000.0
    found = from_wire(to_wire(with_outliers, INT8_ROWS))
    rest = torch.ones(800, dtype=torch.bool)
    rest[3::160] = False
    torch.testing.assert_close(found[..., rest], plain[..., rest], rtol=0, atol=0.02)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(0, 1000), st.floats(1e-30, 1e30))
def test_encoding_what_was_decoded_changes_nothing_more(hidden_size: int, seed: int, size: float) -> None:
    once = from_wire(to_wire(random_states(1, 2, hidden_size, seed=seed) * size, INT8_ROWS))
    twice = from_wire(to_wire(once, INT8_ROWS))
    torch.testing.assert_close(twice, once, rtol=0.01, atol=float(once.abs().max()) / 100)


def test_a_row_of_zeros_stays_so() -> None:
    assert not from_wire(to_wire(torch.zeros(2, 3, 160), INT8_ROWS)).any()


def test_nothing_travels_as_nothing() -> None:
    empty = to_wire(torch.zeros(2, 0, 160), INT8_ROWS)
    assert empty.shape == (2, 0, 160)
    assert from_wire(empty).shape == (2, 0, 160)
    check_wire_finite(empty)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("hidden_size", [32, 576])
@pytest.mark.parametrize("dtype", [INT8_ROWS, "float32", "bfloat16"])
def test_what_is_not_finite_is_found_on_the_other_side(value: float, hidden_size: int, dtype: str) -> None:
    states = random_states(2, 3, hidden_size)
    check_wire_finite(to_wire(states, dtype))
    states[1, 2, 17] = value
    with pytest.raises(InvalidTensorError, match="finite"):
        check_wire_finite(to_wire(states, dtype))


def test_an_outlier_outside_its_row_is_refused() -> None:
    rows = encode_rows(torch.randn(1, 1, 100)).clone()
    rows[..., 102:104] = 255
    with pytest.raises(InvalidTensorError, match="outside"):
        decode_rows(rows, 100)


@pytest.mark.parametrize("shape", [(1, 1, 0), (1, 1, MAX_INT8_ROW + 1)])
def test_rows_without_a_length_that_can_be_named_do_not_travel(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidTensorError, match="rows of 1 to"):
        tensor_bytes(INT8_ROWS, shape)


@pytest.mark.parametrize("dtype", [INT8_ROWS, "float32", "bfloat16", "float16"])
def test_tokens_are_cut_and_joined_as_they_are(dtype: str) -> None:
    states = to_wire(random_states(3, 6, 160), dtype)
    whole = from_wire(states)
    parts = [token_part(states, 0, 2), token_part(states, 2, 6)]
    assert torch.equal(from_wire(parts[1]), whole[:, 2:])
    joined = joined_tokens(parts, [(), ()])
    assert (joined.dtype, joined.shape, bytes(joined.data)) == (dtype, states.shape, bytes(states.data))
    permuted = from_wire(joined_tokens(parts, [(2, 0, 1), ()]))
    assert torch.equal(permuted, torch.cat([whole[[2, 0, 1], :2], whole[:, 2:]], dim=1))


def test_tokens_of_different_dtypes_are_joined_in_the_widest() -> None:
    states = random_states(1, 4, 160)
    joined = joined_tokens([to_wire(states[:, :2]), to_wire(states[:, 2:], INT8_ROWS)], [(), ()])
    assert joined.dtype == "float32"
    assert torch.equal(from_wire(joined)[:, :2], states[:, :2])


def test_a_part_of_one_row_shares_the_memory_of_the_whole() -> None:
    data = bytearray(4 * 8 * 2)
    part = token_part(WireTensor("float32", (1, 2, 8), data), 1, 2)
    data[-4:] = np.float32(1.0).tobytes()
    assert from_wire(part)[0, 0, 7] == 1.0
