"""Attention of a single token in 16 bits on a CPU, with query heads that share their keys as rows of one product.

torch's fused attention takes a matrix of queries for each head. With one row in it, in bfloat16, it is 2 to 15 times
slower than with two or more: 1.45 and 0.19 ms over 1,000 tokens for 9 heads that share 3 heads of keys, 4.7 and 0.30
ms for 32 over 8. So the heads of a group become its rows; where each head has keys of its own, a row of zeros is
added. The numbers are those of the family's own call. transformers looks attention up by a name in the configuration;
families that don't, or that don't take its `sdpa`, stay as they are.
"""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "umbel_grouped_queries"


def group_queries(blocks: Iterable[torch.nn.Module], config: PreTrainedConfig) -> bool:
    """Let blocks of 16 bits on a CPU attend so, if their family can; return whether it does. `config` is the span's."""
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    found = {id(config): config}
    for block in blocks:
        if not hasattr(sys.modules[type(block).__module__], "ALL_ATTENTION_FUNCTIONS"):
            return False
        for module in block.modules():
            own = getattr(module, "config", None)
            if isinstance(own, PreTrainedConfig):
                found[id(own)] = own
    if any(each._attn_implementation != "sdpa" for each in found.values()):
        return False
    for each in found.values():
        each._attn_implementation_internal = _NAME
    return True


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: states are (batch, heads, tokens, head_dim), the output has tokens first."""
    batch_size, num_heads, num_tokens, head_dim = query.shape
    is_special = attention_mask is not None or dropout or kwargs.get("position_bias") is not None
    if num_tokens != 1 or is_special or key.shape[-1] != value.shape[-1]:
        output: torch.Tensor = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )[0]
        return output, None
    num_groups = key.shape[1]
    rows = query.reshape(batch_size, num_groups, num_heads // num_groups, head_dim)
    if num_heads == num_groups:
        rows = functional.pad(rows, (0, 0, 0, 1))
    grouped = functional.scaled_dot_product_attention(rows, key, value, scale=scaling)
    return grouped[:, :, : num_heads // num_groups].reshape(batch_size, 1, num_heads, head_dim), None
