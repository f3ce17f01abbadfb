"""What travels over slow lines unasked does a real model no harm that shows."""

import pytest
import torch

from app.demo import find_model
from bench.wire_quality import Judge
from swarm_client.wire_choice import SLOW_WIRE_DTYPES
from swarm_protocol.model import open_checkpoint

# The test machines have few cores, and others use them.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(open_checkpoint(str(find_model())), num_spans=3, window=256)


def test_the_dtype_for_llamas_family_passes_the_gate(judge: Judge) -> None:
    damage = judge.damage(SLOW_WIRE_DTYPES["llama"])
    print(damage)
    assert damage.passes
    assert damage.divergence > 0  # it was measured: 8 bits are not what they were made of


def test_what_travels_as_it_is_does_none(judge: Judge) -> None:
    damage = judge.damage("float32")
    assert (damage.perplexity, damage.agreement) == (0.0, 1.0)
