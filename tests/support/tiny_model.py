"""Small models: sizes for configurations, and a folder for whole runs."""

import json
from pathlib import Path
from typing import Any

from lora_engine.testing import byte_tokenizer, tiny_llama

# For configurations of decoder models of transformers.
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def save_tiny_model(folder: Path, **config: Any) -> Path:
    """Writes a tiny random Llama whose tokens are bytes into `folder`; returns that."""
    tokenizer = byte_tokenizer()
    special = {"eos_token_id": 0, "pad_token_id": 1, "bos_token_id": None}
    tiny_llama(vocab_size=len(tokenizer), **special, **config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def exchange_tokens(folder: Path) -> None:
    """Gives two tokens of the tokenizer in `folder`, 70 and 71, each other's id."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[70:72]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))
