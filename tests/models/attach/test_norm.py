import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lora_engine
from lora_engine.models.attach.norm import LayerNormForward, RmsNormForward, norm_forward
from lora_engine.testing import error, with_lora

SMALL = {"vocab_size": 97, "max_position_embeddings": 64}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MODELS = {
    "gemma": lambda: transformers.GemmaConfig(**SMALL, **SIZES, num_key_value_heads=2, head_dim=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SMALL, **SIZES, num_key_value_heads=2, head_dim=8
    ),
    "phi": lambda: transformers.PhiConfig(**SMALL, **SIZES),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4
    ),
}


def make(name: str) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name]())
    with torch.no_grad():  # norms start as ones or zeros, which would hide mistakes
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()  # dropout off; gradients are wanted all the same


def loss_and_gradients(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(3))
    loss = model(input_ids=ids, labels=ids.clone()).loss
    loss.backward()
    return loss.item(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "name,operation",
    [("gemma", "rms_norm"), ("gemma3", "rms_norm"), ("phi", "layer_norm"), ("gpt2", "layer_norm")],
)
def test_every_norm_of_a_model_is_replaced(name: str, operation: str, lora: bool) -> None:
    model = with_lora(make(name)).eval() if lora else make(name)
    norms = [n for n, m in model.named_modules() if "Norm" in type(m).__name__]
    loss, grads = loss_and_gradients(model)
    report = lora_engine.accelerate(model)
    replaced = [entry.module for entry in report.replaced if entry.operation == operation]
    assert norms and len(replaced) == len(norms)
    our_loss, our_grads = loss_and_gradients(model)
    assert abs(our_loss - loss) <= 1e-5 * loss and our_grads.keys() == grads.keys()
    for parameter, grad in grads.items():
        assert error(our_grads[parameter], grad, floor=1e-4) < 1e-4, parameter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_offset_is_found_by_a_try(dtype: torch.dtype, offset: float) -> None:
    gemma = transformers.models.gemma.modeling_gemma.GemmaRMSNorm
    llama = transformers.models.llama.modeling_llama.LlamaRMSNorm
    module = (gemma if offset else llama)(32, eps=1e-5)
    module.weight = nn.Parameter(torch.randn(32) * 0.1 + 1 - offset)
    module = module.to(dtype)
    found = norm_forward(module, padding_columns=3)
    assert isinstance(found, RmsNormForward)
    assert (found.offset, found.eps, found.padding_columns) == (offset, 1e-5, 3)
    x = torch.randn(2, 5, 32).to(dtype)
    y = found(x)
    assert y.stride(-2) == 35
    assert torch.allclose(y, module(x), rtol=2e-2, atol=1e-5 if dtype == torch.float32 else 2e-2)


class TwiceRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(8)), 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * torch.nn.functional.rms_norm(x, (8,), self.weight, self.eps)


class OtherLayerNorm(nn.LayerNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    "module", [TwiceRMSNorm(), OtherLayerNorm(8), nn.LayerNorm((4, 8)), nn.Linear(8, 8)], ids=str
)
def test_what_computes_something_else_is_left(module: nn.Module) -> None:
    assert norm_forward(module) is None


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
def test_layer_norm_with_and_without_parameters(options: dict) -> None:
    module = nn.LayerNorm(32, eps=1e-3, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    found = norm_forward(module)
    assert isinstance(found, LayerNormForward)
    x = torch.randn(2, 5, 32)
    assert torch.allclose(found(x), module(x), atol=1e-5)


def test_restore_brings_the_norms_back() -> None:
    model = make("gpt2")
    plain = copy.deepcopy(model)
    lora_engine.accelerate(model)
    lora_engine.restore(model)
    assert all("forward" not in vars(module) for module in model.modules())
    assert loss_and_gradients(model)[0] == loss_and_gradients(plain)[0]
