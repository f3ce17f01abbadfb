"""What single families need, and which cannot be served. The only place that names a family.

A family fits when its base model is a chain: embeddings, one list of blocks that pass on one tensor, a final norm.
Most do and are not mentioned here. Those that multiply the embeddings outside a module, or add learned positions to
them, are described by `Traits`. Anything else that would happen at the edges of a span is found by `parts.py`, which
runs the model once without its blocks before any weight is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from swarm_protocol.errors import UnsupportedFamilyError

CONFIG_ERRORS = (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError, StrictDataclassError)
"""What transformers raises when a configuration contradicts itself or its classes do not work together."""

ATTENTION_TYPES = frozenset({"full_attention", "sliding_attention"})
"""The kinds of layers whose keys and values are a cache by position, which is what a session keeps and rolls back."""


@dataclass(frozen=True, slots=True)
class Traits:
    """How a family departs from the plain chain.

    `positions` names the base model's table of learned positions, which the client's ends add. `neutral` holds the
    attributes of the base model to set in a span, since what they do belongs to the client's ends.
    """

    positions: str | None = None
    neutral: Mapping[str, object] = field(default_factory=dict)


_PLAIN = Traits()
_SCALED_EMBEDDINGS = Traits(neutral={"embedding_multiplier": 1.0})

_TRAITS: Mapping[str, Traits] = {
    "gpt2": Traits(positions="wpe"),
    "gpt_bigcode": Traits(positions="wpe"),
    "gpt_neo": Traits(positions="wpe"),
    "opt": Traits(positions="embed_positions"),
    "granite": _SCALED_EMBEDDINGS,
    "granite_swa": _SCALED_EMBEDDINGS,
    "granitemoe": _SCALED_EMBEDDINGS,
    "granitemoe_swa": _SCALED_EMBEDDINGS,
    "granitemoeshared": _SCALED_EMBEDDINGS,
    "hyperclovax": _SCALED_EMBEDDINGS,
}


def traits_of(config: PreTrainedConfig) -> Traits:
    """Return what is particular about the family of `config`."""
    return _TRAITS.get(config.model_type, _PLAIN)


def kv_bytes_per_token(config: PreTrainedConfig, block: int, dtype: torch.dtype) -> int:
    """Return the size in bytes of one token's keys and values in a block of the model, for one row."""
    # Newer families give blocks configurations of their own, and refuse to answer for all of them at once.
    num_heads, key_dim, value_dim = _kv_heads(config.per_layer_config[block])
    return num_heads * (key_dim + value_dim) * dtype.itemsize


def _kv_heads(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Return the number of heads that are cached, and the size of a cached key and of a value."""
    if getattr(config, "kv_lora_rank", None):
        # Latent attention caches one latent and one rotated part for all heads.
        return 1, int(config.kv_lora_rank), int(config.qk_rope_head_dim)
    num_heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // num_heads)
    num_kv_heads = int(getattr(config, "num_key_value_heads", None) or num_heads)
    if config.model_type == "falcon":
        # The new architecture repeats its keys for every query head before it caches them.
        repeats = config.new_decoder_architecture
        num_kv_heads = num_heads if repeats else 1 if config.multi_query else int(config.num_kv_heads)
    elif config.model_type == "gpt_bigcode" and config.multi_query:
        num_kv_heads = 1
    return num_kv_heads, head_dim, head_dim


def check_model_type(fields: Mapping[str, Any]) -> None:
    """Raise UnsupportedFamilyError if transformers has no class for a config.json, before anything is made of it."""
    model_type = fields.get("model_type")
    if not isinstance(model_type, str):
        raise UnsupportedFamilyError("config.json names no model_type, so the architecture is unknown")
    if model_type not in CONFIG_MAPPING:
        if "auto_map" in fields:
            raise UnsupportedFamilyError(f"{model_type} needs code from its own repository, which is never run")
        raise UnsupportedFamilyError(f"{model_type} is unknown to the installed transformers; a newer one may know it")


def check_config(config: PreTrainedConfig) -> None:
    """Raise UnsupportedFamilyError, naming the family and the reason, if it cannot be cut into spans."""
    reason = _misfit(config)
    if reason:
        raise UnsupportedFamilyError(f"{config.model_type} cannot be cut into spans: {reason}")


def _misfit(config: PreTrainedConfig) -> str | None:
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder, and only decoders are served"
    if config.get_text_config() is not config:
        return "it is multimodal, and only text decoders are served; extract its text model"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "transformers has no causal language model for it"
    if getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_is_stateful", False):
        return "its blocks keep a recurrent state, which cannot be rolled back"
    others = set(getattr(config, "layer_types", None) or ()) - ATTENTION_TYPES
    if others:
        return f"it has blocks of the kind {', '.join(sorted(map(str, others)))}"
    if getattr(config, "num_kv_shared_layers", 0):
        return "some of its blocks use the keys of other blocks"
    if getattr(config, "add_cross_attention", False):
        return "its blocks attend to an encoder"
    if not (isinstance(getattr(config, "num_hidden_layers", None), int) and config.num_hidden_layers > 0):
        return "its config does not say how many blocks it has"
    return None
