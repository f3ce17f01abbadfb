"""The distributed model: a transformers model whose blocks run in the swarm.

    from swarm_client import AutoDistributedModelForCausalLM

    model = AutoDistributedModelForCausalLM.from_pretrained(path_or_repo, initial_peers=[…])
    with model.inference_session(max_length=512):
        model.generate(input_ids, max_new_tokens=20)

Names are imported when they are first used (PEP 562): the chat site needs the interfaces at once, and the libraries
behind the models only when it opens one.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swarm_client.config import ClientConfig
    from swarm_client.events import Prefilled, Recovered, RouteChanged, RoutePart, Waiting
    from swarm_client.generation.text_session import (
        ChatMessage,
        SamplingParams,
        TextDelta,
        TextModel,
        TextSession,
        TokenLogprobs,
    )
    from swarm_client.generation_times import GenerationTimes
    from swarm_client.inference_session import InferenceSession
    from swarm_client.model import AutoDistributedModelForCausalLM, DistributedCausalLM
    from swarm_client.swarm import Swarm
    from swarm_client.text_models import open_text_model
    from swarm_protocol.errors import SwarmError

__all__ = [
    "AutoDistributedModelForCausalLM",
    "ChatMessage",
    "ClientConfig",
    "DistributedCausalLM",
    "GenerationTimes",
    "InferenceSession",
    "Prefilled",
    "Recovered",
    "RouteChanged",
    "RoutePart",
    "SamplingParams",
    "Swarm",
    "SwarmError",
    "TextDelta",
    "TextModel",
    "TextSession",
    "TokenLogprobs",
    "Waiting",
    "open_text_model",
]

_HOMES = {
    "AutoDistributedModelForCausalLM": "swarm_client.model",
    "ChatMessage": "swarm_client.generation.text_session",
    "ClientConfig": "swarm_client.config",
    "DistributedCausalLM": "swarm_client.model",
    "GenerationTimes": "swarm_client.generation_times",
    "InferenceSession": "swarm_client.inference_session",
    "Prefilled": "swarm_client.events",
    "Recovered": "swarm_client.events",
    "RouteChanged": "swarm_client.events",
    "RoutePart": "swarm_client.events",
    "SamplingParams": "swarm_client.generation.text_session",
    "Swarm": "swarm_client.swarm",
    "SwarmError": "swarm_protocol.errors",
    "TextDelta": "swarm_client.generation.text_session",
    "TextModel": "swarm_client.generation.text_session",
    "TextSession": "swarm_client.generation.text_session",
    "TokenLogprobs": "swarm_client.generation.text_session",
    "Waiting": "swarm_client.events",
    "open_text_model": "swarm_client.text_models",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
