"""A policy's value head in the file that others read."""

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_engine import UserError
from lora_engine.models.load.scalar import VALUE_HEAD_FILE, add_value_head, save_value_head
from lora_engine.testing import tiny_llama, with_lora

IDS = torch.tensor([[5, 9, 2, 7]])
NAMES = {"v_head.summary.weight", "v_head.summary.bias"}


def valued(model, scale=0.1):
    """With a value head that has learned something."""
    add_value_head(model)
    head = model.get_base_model().value_head
    torch.manual_seed(3)
    torch.nn.init.normal_(head.weight, std=scale)
    torch.nn.init.constant_(head.bias, 0.5)
    return model, head


def values_of(model, folder):
    """As TRL's AutoModelForCausalLMWithValueHead computes them: v_head.summary on the last of
    transformers' hidden states."""
    stored = load_file(folder / VALUE_HEAD_FILE)
    assert set(stored) == NAMES and {x.dtype for x in stored.values()} == {torch.float32}
    with torch.no_grad():
        hidden = model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    weight, bias = stored["v_head.summary.weight"], stored["v_head.summary.bias"]
    return torch.nn.functional.linear(hidden, weight, bias)


def test_beside_an_adapter_it_is_read_by_transformers_and_peft(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model, head = valued(with_lora(base))
    with torch.no_grad():
        own = head(model(input_ids=IDS, output_hidden_states=True).hidden_states[-1])
    model.save_pretrained(tmp_path / "adapter")
    save_value_head(model, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(values_of(loaded, tmp_path / "adapter"), own)
    assert own.std() > 0.01
    add_value_head(loaded, tmp_path / "adapter")
    again = loaded.get_base_model().value_head
    assert torch.equal(again.weight, head.weight) and torch.equal(again.bias, head.bias)


def test_a_model_without_one_has_no_such_file(tmp_path):
    save_value_head(tiny_llama(), tmp_path)
    assert list(tmp_path.iterdir()) == []
    model = tiny_llama()
    add_value_head(model, tmp_path)
    assert not model.value_head.weight.any()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no tensors", "holds no value head"),
        ({"weight": torch.zeros(1, 32)}, "holds no value head"),
        (
            {"v_head.summary.weight": torch.zeros(1, 16), "v_head.summary.bias": torch.zeros(1)},
            r"v_head.summary.weight is \[1, 16\], the model's value head \[1, 32\]; give the model",
        ),
    ],
)
def test_a_file_of_something_else_is_one_line(tmp_path, content, said):
    path = tmp_path / VALUE_HEAD_FILE
    path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path)
    with pytest.raises(UserError, match=said) as caught:
        add_value_head(tiny_llama(), tmp_path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))
