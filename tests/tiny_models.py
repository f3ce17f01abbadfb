"""Tiny random models of every family that is tested, and checkpoints of them on disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

# The test machines have few cores, and models this small only lose by sharing their work.
torch.set_num_threads(1)

NUM_BLOCKS = 5
VOCAB_SIZE = 99

_LLAMA_LIKE: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS: Mapping[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
_GPT_LIKE: Mapping[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCAB_SIZE}
_FALCON: Mapping[str, Any] = {
    **_GPT_LIKE,
    "hidden_size": 32,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bias": False,
}

TINY_CONFIGS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "bloom": ("bloom", {**_GPT_LIKE, "hidden_size": 32, "n_layer": NUM_BLOCKS, "n_head": 4, "pad_token_id": 3}),
    "llama": ("llama", _LLAMA_LIKE),
    "llama_tied": ("llama", {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "llama_rope": (
        "llama",
        {
            **_LLAMA_LIKE,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "mistral": ("mistral", {**_LLAMA_LIKE, "sliding_window": 6, "head_dim": 8}),
    "mixtral": ("mixtral", {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2": (
        "qwen2",
        {**_LLAMA_LIKE, "use_sliding_window": True, "sliding_window": 6, "layer_types": _ALTERNATING},
    ),
    "qwen3": ("qwen3", {**_LLAMA_LIKE, "head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", {**_LLAMA_LIKE, **_EXPERTS, "head_dim": 8, "decoder_sparse_step": 2}),
    "gemma2": (
        "gemma2",
        {
            **_LLAMA_LIKE,
            "head_dim": 16,
            "sliding_window": 6,
            "query_pre_attn_scalar": 16,
            "layer_types": _ALTERNATING,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            **_LLAMA_LIKE,
            "head_dim": 16,
            "sliding_window": 6,
            "query_pre_attn_scalar": 16,
            "layer_types": _ALTERNATING,
        },
    ),
    "falcon_old": (
        "falcon",
        {**_FALCON, "new_decoder_architecture": False, "multi_query": True, "alibi": False, "parallel_attn": True},
    ),
    "falcon_new": ("falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    "falcon_alibi": (
        "falcon",
        {**_FALCON, "new_decoder_architecture": False, "multi_query": False, "alibi": True, "parallel_attn": False},
    ),
    "gpt_neox": (
        "gpt_neox",
        {
            **_GPT_LIKE,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": NUM_BLOCKS,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
    ),
    "phi3": ("phi3", {**_LLAMA_LIKE, "sliding_window": None}),
    "olmo2": ("olmo2", _LLAMA_LIKE),
    "gpt_oss": (
        "gpt_oss",
        {
            **_LLAMA_LIKE,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 6,
            "layer_types": _ALTERNATING,
        },
    ),
    "smollm3": ("smollm3", {**_LLAMA_LIKE, "no_rope_layers": [1, 0, 1, 1, 0], "layer_types": None}),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_LLAMA_LIKE,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 6,
            "first_k_dense_replace": 2,
        },
    ),
    "gemma4_text": (
        "gemma4_text",
        {
            **_LLAMA_LIKE,
            "head_dim": 8,
            "global_head_dim": 16,
            "sliding_window": 6,
            "layer_types": _ALTERNATING,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
        },
    ),
    "olmo": ("olmo", _LLAMA_LIKE),
    "granite": ("granite", {**_LLAMA_LIKE, "embedding_multiplier": 3.0, "logits_scaling": 2.0}),
    "opt": (
        "opt",
        {
            **_GPT_LIKE,
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": NUM_BLOCKS,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 24,
            "pad_token_id": 3,
        },
    ),
    "gptj": ("gptj", {**_GPT_LIKE, "n_embd": 32, "n_layer": NUM_BLOCKS, "n_head": 4, "rotary_dim": 4}),
    "gpt2": (
        "gpt2",
        {
            **_GPT_LIKE,
            "n_embd": 32,
            "n_layer": NUM_BLOCKS,
            "n_head": 4,
            "n_positions": 128,
            "scale_attn_by_inverse_layer_idx": True,
        },
    ),
}
"""Name to model type and settings; hybrid windows, experts, ALiBi and tables of positions are all among them."""


def tiny_config(name: str, **changes: Any) -> PreTrainedConfig:
    """Return the configuration of a tiny model, with `changes` to its settings."""
    model_type, settings = TINY_CONFIGS[name]
    return CONFIG_MAPPING[model_type](**{**settings, **changes})


def tiny_model(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a random model in float32 whose blocks matter: weights are drawn wide, norms and biases too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.15 if parameter.dim() > 1 else 0.05))
    return model


def save_tiny_model(name: str, folder: Path, max_shard_size: str = "40KB", **changes: Any) -> PreTrainedModel:
    """Write a tiny model to `folder`, in several shards by default, and return it."""
    model = tiny_model(name, **changes)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model
