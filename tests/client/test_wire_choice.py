"""In which dtype hidden states travel: what the nodes compute with, and less over slow lines."""

import pytest
import torch

from swarm_client.routing.find_route import Hop
from swarm_client.wire_choice import WIRE_CHOICES, check_choice, choose_wire_dtype
from swarm_protocol.errors import ConfigError
from swarm_protocol.ids import PeerId
from swarm_protocol.spans import Span
from swarm_protocol.wire_tensor import INT8_ROWS

SLOW, FAST = 1e6, 1e9


def hop(dtype: str, uplink: float | None = None) -> Hop:
    return Hop(PeerId("Qm"), Span(0, 1), "", dtype, uplink)


@pytest.mark.parametrize(
    ("choice", "dtypes", "uplinks", "family", "own", "wanted"),
    [
        ("auto", ["float32"], [None], "llama", "float32", "float32"),
        ("auto", ["bfloat16", "bfloat16"], [None, FAST], "llama", "float32", "bfloat16"),
        ("auto", ["bfloat16", "float32"], [None, None], "llama", "float32", "float32"),
        ("auto", ["bfloat16", "float16"], [None, None], "llama", "float32", "float32"),
        ("auto", ["float32"], [None], "llama", "bfloat16", "bfloat16"),
        ("auto", ["float32", "float32"], [FAST, SLOW], "llama", "float32", INT8_ROWS),
        ("auto", ["float32"], [SLOW], "bloom", "float32", "bfloat16"),
        ("auto", ["float16"], [SLOW], "bloom", "float32", "float16"),
        ("auto", ["", ""], [None, None], "llama", "float32", "float32"),
        ("auto", ["unheard of"], [None], "llama", "float16", "float16"),
        ("auto", [], [], "llama", "float32", "float32"),
        ("computed", ["bfloat16"], [SLOW], "llama", "float32", "bfloat16"),
        ("float32", ["bfloat16"], [SLOW], "llama", "float32", "float32"),
        ("float32", ["float32"], [None], "llama", "bfloat16", "bfloat16"),
        ("bfloat16", ["float32"], [None], "bloom", "float32", "bfloat16"),
        (INT8_ROWS, ["float32"], [FAST], "bloom", "float32", INT8_ROWS),
    ],
)
def test_the_dtype_that_travels(
    choice: str, dtypes: list[str], uplinks: list[float | None], family: str, own: str, wanted: str
) -> None:
    hops = [hop(dtype, uplink) for dtype, uplink in zip(dtypes, uplinks, strict=True)]
    assert choose_wire_dtype(choice, hops, family, own, slow_bytes_per_s=12.5e6) == wanted


def test_a_choice_that_there_is_not_is_named() -> None:
    for choice in WIRE_CHOICES:
        check_choice(choice)
    with pytest.raises(ConfigError, match="int4"):
        check_choice("int4")


def test_what_nodes_compute_with_travels_without_a_loss() -> None:
    # From bfloat16 to float32 and back nothing changes, so the narrower way is as good.
    states = torch.randn(4, 64).bfloat16()
    assert torch.equal(states.float().bfloat16(), states)
