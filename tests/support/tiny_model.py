"""A model folder for whole runs: a tiny random Llama whose tokens are bytes."""

from pathlib import Path
from typing import Any

from lora_engine.testing import byte_tokenizer, tiny_llama


def save_tiny_model(folder: Path, **config: Any) -> Path:
    """Write model, tokenizer and chat template into `folder`; returns it."""
    tokenizer = byte_tokenizer()
    special = {"eos_token_id": 0, "pad_token_id": 1, "bos_token_id": None}
    tiny_llama(vocab_size=len(tokenizer), **special, **config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
