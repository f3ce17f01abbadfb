"""The bytes of the tokens of a text, put together, are the text, with the tokenizers that models come with."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from swarm_client.generation.token_bytes import _byte_alphabet, token_bytes

TEXT = "Hello wörld, 🌸 <b> é"


def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges: a token for each byte, as GPT-2's, Llama 3's and Qwen's begin."""
    vocabulary = _byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, "Ġw": 256}, merges=[("Ġ", "w")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def sentencepiece() -> PreTrainedTokenizerFast:
    """A BPE with byte fallback and ▁ for spaces, as Llama 2's and Gemma's."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁Helowrd,<b>", "▁w"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: at for at, piece in enumerate(dict.fromkeys(pieces))},
            merges=[("▁", "w")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_the_bytes_of_tokens_are_those_of_the_text(make) -> None:
    tokenizer = make()
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert b"".join(token_bytes(tokenizer, token_id) for token_id in ids) == TEXT.encode()
    assert len(ids) > len(TEXT)  # characters were cut


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_special_tokens_have_their_name_and_unknown_ids_nothing(make) -> None:
    tokenizer = make()
    assert token_bytes(tokenizer, tokenizer.eos_token_id) == b"<|end|>"
    assert token_bytes(tokenizer, len(tokenizer) + 5) == b""
