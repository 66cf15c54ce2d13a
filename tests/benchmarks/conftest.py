import sys
from pathlib import Path

import pytest

# The benchmarks are scripts beside each other, not a package.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    """Folder of a tiny random Llama with a tokenizer of bytes and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from lora_engine.testing import tiny_llama

    special = ["<end>", "<pad>", "<user>", "<assistant>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<end>",
        pad_token="<pad>",
        additional_special_tokens=special[2:],
        chat_template=CHAT_TEMPLATE,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny_llama(vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=1, bos_token_id=None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
