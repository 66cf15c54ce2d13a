import pytest
import torch
from transformers.activations import ACT2FN

from lora_engine.models.attach.mlp import activation_name


@pytest.mark.parametrize(
    "act,name",
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_new", "gelu_tanh"),
        ("quick_gelu", None),
        ("relu", None),
        ("tanh", None),
    ],
)
def test_activations_are_known_by_what_they_compute(act: str, name: str | None) -> None:
    assert activation_name(ACT2FN[act]) == name


def test_what_is_no_activation_has_no_name() -> None:
    assert activation_name(lambda x: x.sum()) is None
    assert activation_name(lambda x, y: x) is None
    assert activation_name(lambda x: torch.zeros(3) @ x) is None
