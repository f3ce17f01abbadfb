"""Checkpoints with a real model's shape and random weights, for measurements that need no sense in the answers."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

END = "<end>"


def save_bloom_560m(folder: Path) -> Path:
    """Write a model of bloom-560m's shape into the new `folder`: 24 blocks, 1.1 GB in bfloat16.

    Its tokenizer has a word for each token. Returns the folder.
    """
    config = BloomConfig(hidden_size=1024, n_layer=24, n_head=16, vocab_size=250_880, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = BloomForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    words = {END: 0, **{f"w{number}": number for number in range(1, config.vocab_size)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token=END)), eos_token=END
    )
    tokenizer.save_pretrained(folder)
    return folder
