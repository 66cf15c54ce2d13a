"""Chat templates in Ollama's language: what they write, by the roles' texts."""

import pytest
from chat_templates import CHATML_DEFAULT_SYSTEM
from small_ggufs import byte_level

from lora_engine.export.ollama import go_template, modelfile

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COUNTING = "{% for m in messages %}{{ loop.index }}{{ m.role }}{{ m.content }}{% endfor %}A:"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level("qwen2")


def test_a_template_of_messages_between_fixed_texts(tokenizer):
    tokenizer.chat_template = CHATML
    assert go_template(tokenizer) == (
        "{{ range .Messages }}"
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_start|>assistant\n"
    )


def test_a_default_system_message_and_a_start_token(tokenizer):
    tokenizer.chat_template = CHATML_DEFAULT_SYSTEM
    template = go_template(tokenizer)
    assert template.startswith("{{ if not .System }}<|im_start|>system\n")
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    assert go_template(tokenizer).startswith(
        "{{ if not .System }}<s>{{ end }}{{ range .Messages }}"
    )
    tokenizer = byte_level("llama-bpe")  # puts <s> before a text, as its file says
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    assert go_template(tokenizer).startswith("{{ range .Messages }}")


def test_a_turn_may_begin_with_the_start_token(tokenizer):
    """As SmolLM2's do, whose tokenizer puts none before a text."""
    tokenizer.chat_template = CHATML_DEFAULT_SYSTEM
    expected = go_template(tokenizer)
    tokenizer.bos_token = "<|im_start|>"
    try:
        assert go_template(tokenizer) == expected
    finally:
        tokenizer.bos_token = "<s>"


def test_a_template_that_changes_in_a_longer_conversation_is_left_out(tokenizer):
    third = "{% if m.role == 'user' and loop.index0 == 2 %}!{% endif %}"
    tokenizer.chat_template = CHATML.replace("<|im_end|>", third + "<|im_end|>")
    assert go_template(tokenizer) is None


def test_a_template_of_another_kind_is_left_out(tokenizer):
    tokenizer.chat_template = COUNTING
    assert go_template(tokenizer) is None
    text = modelfile("m.gguf", tokenizer, [2])
    assert "TEMPLATE by hand" in text
    assert text.endswith('PARAMETER stop "<|im_end|>"\nPARAMETER stop "</s>"\n')
    tokenizer.chat_template = None
    assert "TEMPLATE" not in modelfile("m.gguf", tokenizer, [])
