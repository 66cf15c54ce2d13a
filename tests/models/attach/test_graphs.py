"""Who wants an accelerated model as one graph, or without values, is told to restore it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import lora_engine
from lora_engine import UserError
from lora_engine.testing import tiny_llama, with_lora

IDS = torch.arange(3, 15).view(2, 6)


def tiny_gpt2() -> Any:
    """A model whose layers stay transformers' own, but for their attention."""
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=97, **sizes))


def export(strict: bool) -> Callable[[nn.Module, Tensor], object]:
    return lambda model, x: torch.export.export(model, (x,), {"use_cache": False}, strict=strict)


def trace(model: nn.Module, x: Tensor) -> object:
    return torch.jit.trace(model, x, strict=False)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("record", [export(strict=False), trace], ids=["export", "trace"])
def test_graphs_are_refused_in_one_line(make: Callable[[], Any], record: Any) -> None:
    model = make().eval()
    lora_engine.accelerate(model)
    for part, given in ((model, IDS), (model.base_model, IDS)):
        with torch.no_grad(), pytest.raises(UserError, match=r"restore\(model\)") as caught:
            record(part, given)
        assert "\n" not in str(caught.value)


def test_the_compiler_s_own_error_says_the_same() -> None:
    model = with_lora(tiny_llama()).eval()
    lora_engine.accelerate(model)
    with torch.no_grad(), pytest.raises(Exception, match=r"call lora_engine.restore\(model\)"):
        export(strict=True)(model, IDS)


def of_fakes(model: Any, x: Tensor) -> object:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return model(inputs_embeds=x.clone())


def mapped(model: Any, x: Tensor) -> object:
    return torch.func.vmap(lambda row: model(inputs_embeds=row[None]).logits)(x)


def on_meta(model: Any, x: Tensor) -> object:
    return model.model.layers[0].mlp(x.to("meta"))


def wrapped(model: Any, x: Tensor) -> object:
    return model(inputs_embeds=TwoTensor(x, x.clone()))


@pytest.mark.parametrize("call", [of_fakes, mapped, on_meta, wrapped])
def test_tensors_that_kernels_cannot_read_are_refused(call: Callable[..., object]) -> None:
    """A kernel would read the address zero."""
    model = tiny_llama().eval()
    lora_engine.accelerate(model)
    with torch.no_grad(), pytest.raises(UserError, match=r"no memory of its own.*restore\(model\)"):
        call(model, torch.randn(2, 6, 32))


def test_parameters_that_kernels_cannot_read_are_refused() -> None:
    model = tiny_llama()
    weight = model.model.norm.weight.detach()
    model.model.norm.weight = nn.Parameter(TwoTensor(weight, weight.clone()))
    with pytest.raises(UserError, match=r"model.norm.weight is a TwoTensor"):
        lora_engine.accelerate(model)
