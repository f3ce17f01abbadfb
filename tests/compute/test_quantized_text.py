"""What quantized blocks cost a real model: perplexity of a text, against float32. Run with -s to see the figures."""

import math
from typing import Literal

import pytest
import torch
from torch import nn
from torch.nn import functional

from app.demo import find_model
from server_node.compute.bitsandbytes_layers import BitsAndBytes
from server_node.compute.block_loader import load_blocks
from server_node.compute.quantization import scheme_of
from swarm_protocol.model import load_ends, load_span, open_checkpoint
from swarm_protocol.model.checkpoint import Checkpoint
from swarm_protocol.model.parts import EndsModule, SpanModule
from swarm_protocol.model.quantized_linears import QuantizedLinear, is_eligible
from swarm_protocol.spans import Span

# The test machines have few cores, and others use them.
torch.set_num_threads(1)

CPU, WHOLE = torch.device("cpu"), Span(0, 30)
TEXT = """The river rises in the hills to the north of the town and runs for about sixty miles before it reaches the
sea. In the spring, when the snow melts, the water is high and cold, and the fields along its banks are often flooded
for several days. Farmers have learned to live with this: they build their houses on the higher ground, keep their
animals away from the water until May, and plant their crops late. In return the river leaves a layer of dark, rich soil
on the land every year, so that nobody needs to buy fertilizer. A hundred years ago, a mill stood at the bend below the
church. It ground wheat for the whole valley, and its owner was one of the richest men in the county. When the railway
came, flour could be brought from the city at half the price, and the mill was closed. Today it is a small museum, where
children can see how the great wheel turned the stones and how much work it took to make a loaf of bread."""


class Judge:
    """Computes a span's perplexity, relative to that of the same blocks in float32."""

    def __init__(self, checkpoint: Checkpoint, ends: EndsModule) -> None:
        ids = checkpoint.tokenizer()(TEXT.replace("\n", " "), return_tensors="pt").input_ids
        self.ends, self.ids = ends, ids
        self.plain = load_span(checkpoint, WHOLE, dtype=torch.float32, device=CPU)
        self._wanted = self._loss(self.plain)

    def excess(self, span: SpanModule) -> float:
        return math.expm1(self._loss(span) - self._wanted)

    @torch.inference_mode()
    def _loss(self, span: SpanModule) -> float:
        hidden_states = span(self.ends.embed(self.ids).to(span.dtype)).float()
        return functional.cross_entropy(self.ends.logits(hidden_states)[0, :-1], self.ids[0, 1:]).item()


@pytest.fixture(scope="module")
def smollm2() -> Checkpoint:
    return open_checkpoint(str(find_model()))


@pytest.fixture(scope="module")
def judge(smollm2: Checkpoint) -> Judge:
    return Judge(smollm2, load_ends(smollm2, dtype=torch.float32, device=CPU))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("int8", torch.float32), ("int8", torch.bfloat16), ("nf4", torch.bfloat16)]
)
def test_quantized_blocks_cost_less_than_a_hundredth_of_perplexity(
    smollm2: Checkpoint, judge: Judge, kind: str, dtype: torch.dtype
) -> None:
    runner = load_blocks(smollm2, WHOLE, dtype=dtype, device=CPU, scheme=scheme_of(kind, CPU))
    excess = judge.excess(runner.module)
    print(f"{kind}, {dtype}: perplexity {100 * excess:+.2f} %")
    # The file holds 4-bit numbers in groups as those of nf4, which finds them again; int8 is as good for any file.
    assert abs(excess) < 0.01


@pytest.mark.parametrize(("kind", "limit"), [("int8", 0.03), ("nf4", 0.2)])
def test_what_a_cuda_node_quantizes_costs_little(
    smollm2: Checkpoint, judge: Judge, kind: Literal["int8", "nf4"], limit: float
) -> None:
    runner = load_blocks(smollm2, WHOLE, dtype=torch.bfloat16, device=CPU, scheme=BitsAndBytes(kind))
    excess = judge.excess(runner.module)
    print(f"{kind} of bitsandbytes: perplexity {100 * excess:+.2f} %")
    assert abs(excess) < limit


def test_4_bits_in_other_groups_than_the_files_cost_a_fifth_at_most(judge: Judge) -> None:
    scheme = scheme_of("nf4", CPU)
    assert scheme is not None
    for module in judge.plain.modules():
        if isinstance(module, nn.Linear) and is_eligible(module):
            shifted = nn.Linear(module.in_features, module.out_features, bias=False)
            shifted.weight = nn.Parameter(module.weight.roll(16, 1), requires_grad=False)
            module.weight.data.copy_(QuantizedLinear(shifted, scheme).weight.roll(-16, 1))
    excess = judge.excess(judge.plain)
    print(f"nf4 in other groups: perplexity {100 * excess:+.2f} %")
    assert excess < 0.2
