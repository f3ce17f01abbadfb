"""Parts of adapters are named by what they are, and checked before anybody uses them."""

import math
from dataclasses import replace

import pytest
import torch

from swarm_protocol.errors import InvalidAdapterError
from swarm_protocol.model.trained import MAX_RANK, BlockAdapter, LoraMatrices, check_part, part_id

HIDDEN = 8


def part(**changes: object) -> BlockAdapter:
    made = torch.Generator().manual_seed(1)
    lora = {
        path: LoraMatrices(torch.randn(2, HIDDEN, generator=made), torch.randn(6, 2, generator=made), 0.5)
        for path in ("mlp.up", "attn.q")
    }
    return replace(BlockAdapter(lora, torch.randn(3, HIDDEN, generator=made)), **changes)  # type: ignore[arg-type]


def with_matrices(matrices: LoraMatrices) -> BlockAdapter:
    return BlockAdapter({"attn.q": matrices})


def test_the_name_does_not_depend_on_the_order_or_the_memory() -> None:
    first = part()
    turned = {
        path: replace(first.lora[path], a=first.lora[path].a.t().contiguous().t()) for path in ("attn.q", "mlp.up")
    }
    assert part_id(replace(first, lora=turned)) == part_id(first)


def test_whatever_changes_makes_another_name() -> None:
    first = part()
    matrices = first.lora["attn.q"]
    flipped = matrices.b.clone()
    flipped[5, 1] += 1e-6
    others = [
        first,
        replace(first, prompt=None),
        replace(first, prompt=first.prompt[:2]),  # type: ignore[index]
        replace(first, lora={}),
        replace(first, lora={**first.lora, "attn.q": replace(matrices, b=flipped)}),
        replace(first, lora={**first.lora, "attn.q": replace(matrices, scale=0.25)}),
        replace(first, lora={**first.lora, "attn.q": replace(matrices, a=matrices.a.reshape(4, 4))}),
        replace(first, lora={**first.lora, "attn.q": replace(matrices, a=matrices.a.to(torch.bfloat16))}),
        replace(first, lora={"attn.k": matrices, "mlp.up": first.lora["mlp.up"]}),
    ]
    assert len({part_id(each) for each in others}) == len(others)


def test_a_sound_part_passes() -> None:
    check_part(part(), HIDDEN)
    check_part(BlockAdapter(), HIDDEN)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (with_matrices(LoraMatrices(torch.zeros(2, 8), torch.zeros(6, 3), 1.0)), "shapes"),
        (with_matrices(LoraMatrices(torch.zeros(8), torch.zeros(6, 2), 1.0)), "shapes"),
        (with_matrices(LoraMatrices(torch.zeros(0, 8), torch.zeros(6, 0), 1.0)), "rank"),
        (with_matrices(LoraMatrices(torch.zeros(MAX_RANK + 1, 1), torch.zeros(1, MAX_RANK + 1), 1.0)), "rank"),
        (with_matrices(LoraMatrices(torch.zeros(2, 8), torch.full((6, 2), math.nan), 1.0)), "not finite"),
        (with_matrices(LoraMatrices(torch.zeros(2, 8), torch.zeros(6, 2), math.inf)), "scale"),
        (with_matrices(LoraMatrices(torch.zeros(2, 8, dtype=torch.int64), torch.zeros(6, 2), 1.0)), "dtype"),
        (BlockAdapter({"attn/../q": LoraMatrices(torch.zeros(2, 8), torch.zeros(6, 2), 1.0)}), "path"),
        (BlockAdapter({}, torch.zeros(3, HIDDEN + 1)), "prompt"),
        (BlockAdapter({}, torch.zeros(0, HIDDEN)), "prompt"),
        (BlockAdapter({}, torch.full((3, HIDDEN), math.inf)), "not finite"),
    ],
)
def test_an_unsound_part_is_refused(bad: BlockAdapter, said: str) -> None:
    with pytest.raises(InvalidAdapterError, match=said):
        check_part(bad, HIDDEN)
