"""Checkpoints for measurements: a real model's shape with random weights, and the demo's model in a fast format."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    PreTrainedTokenizerFast,
)

from app.demo import find_model

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


def save_smollm2(folder: Path) -> Path:
    """Write the demo's model into the new `folder` as safetensors in float32. Returns the folder.

    Of the four seconds of a processor that a node takes to read a GGUF file, most go to its vocabulary.
    """
    source = find_model()
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # The weights are dequantized, but the model still counts as quantized, which cannot be saved.
    del model.hf_quantizer, model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    return folder
