"""Several models of one process are built at the same time: a site opens each on a thread of its own."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from transformers import LlamaConfig

from swarm_protocol.model.anatomy import build_empty

CONFIG = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=12, num_attention_heads=4, vocab_size=128)


def test_nothing_of_the_process_is_changed_after_models_were_built_at_once():
    initializer, dtype = nn.init.normal_, torch.get_default_dtype()
    with ThreadPoolExecutor(8) as pool:
        built = list(pool.map(lambda _: build_empty(CONFIG, torch.bfloat16), range(16)))
    assert {parameter.dtype for model in built for parameter in model.parameters()} == {torch.bfloat16}
    assert nn.init.normal_ is initializer
    assert torch.get_default_dtype() is dtype
    weights = nn.init.normal_(torch.zeros(100))
    assert weights.abs().max() > 0
