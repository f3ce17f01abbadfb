"""Grouped queries give what the family's own attention gives, for every family."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from server_node.compute import grouped_queries
from server_node.compute.batch_runner import BatchRunner, Joining
from server_node.compute.block_loader import load_blocks
from server_node.compute.block_runner import BlockRunner
from server_node.compute.grouped_queries import group_queries
from swarm_protocol.model import load_span, open_checkpoint
from swarm_protocol.spans import Span
from tests.tiny_models import TINY_CONFIGS, save_tiny_model

CPU, SPAN = torch.device("cpu"), Span(1, 4)
OWN_WAY = {"bloom", "falcon", "gemma2", "gpt_oss", "gptj", "deepseek_v3"}
"""Families whose attention is not looked up, or is not torch's fused one, or has keys of another width than values."""


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_every_family_computes_the_same(
    name: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp(name)
    save_tiny_model(name, folder)
    checkpoint = open_checkpoint(str(folder))
    own, grouped = (BlockRunner(load_span(checkpoint, SPAN, dtype=torch.float32, device=CPU)) for _ in range(2))
    is_grouped = group_queries(grouped.module.blocks, grouped.module.config)
    calls: list[torch.Size] = []
    fused = functional.scaled_dot_product_attention

    def count(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(query.shape)
        return fused(query, *args, **kwargs)

    states = torch.randn(2, 9, own.module.config.hidden_size, generator=torch.Generator().manual_seed(1))
    outputs = []
    for runner in (own, grouped):
        cache = runner.new_cache(2, 16, SPAN)
        runner.run_step(cache, states[:, :4], 0, SPAN)
        monkeypatch.setattr(grouped_queries.functional, "scaled_dot_product_attention", count)
        calls.clear()
        outputs.append(torch.cat([runner.run_step(cache, states[:, at : at + 1], at, SPAN) for at in range(4, 9)], 1))
        monkeypatch.setattr(grouped_queries.functional, "scaled_dot_product_attention", fused)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    if checkpoint.config.model_type not in OWN_WAY:
        assert is_grouped
        assert any(rows >= 2 for _, _, rows, _ in calls)


def test_blocks_of_16_bits_on_a_cpu_are_grouped(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_model("llama", folder)
    names = []
    for dtype in (torch.float32, torch.bfloat16):
        runner = load_blocks(open_checkpoint(str(folder)), SPAN, dtype=dtype, device=CPU)
        names.append(runner.module.config._attn_implementation)
        assert BatchRunner(runner).joining is Joining.PADDED
    assert names == ["sdpa", "umbel_grouped_queries"]
