"""A model folder for whole runs: a tiny random Llama whose tokens are bytes."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_engine.testing import tiny_llama

ROLES = ["<user>", "<assistant>", "<system>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_tiny_model(folder: Path, **config: Any) -> Path:
    """Write model, tokenizer and chat template into `folder`; returns it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<end>", "<pad>", *ROLES, *alphabet])}
    bytes_to_tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_to_tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_to_tokens.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_to_tokens,
        eos_token="<end>",
        pad_token="<pad>",
        additional_special_tokens=ROLES,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    special = {"eos_token_id": 0, "pad_token_id": 1, "bos_token_id": None}
    tiny_llama(vocab_size=len(tokenizer), **special, **config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
