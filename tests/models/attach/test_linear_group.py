"""One LoRA linear, and three that share their input, against PEFT's own layers."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lora_engine import ops, reference
from lora_engine.models.attach.linear_group import LinearGroup
from lora_engine.models.attach.patches import Patches
from lora_engine.models.peft.router import AdapterRouter
from lora_engine.testing import error

FEATURES = 40
GROUPS = {"one": {"o": 24}, "three": {"q": 24, "k": 8, "v": 16}}
RANKS = (1, 8, 16, 64)
DROPOUT = 0.3
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "both_bias": {"lora_bias": True, "bias": "all"},
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": DROPOUT},
    "dora": {"use_dora": True},
    "dora_bias": {"use_dora": True, "bias": "all"},
    "partial": {"target_modules": ["q", "v", "o"]},
    "ranks": {"rank_pattern": {"k": 3}, "alpha_pattern": {"v": 5}},
}


class Linears(nn.Module):
    """Linears side by side; `adapted` has PEFT's layers in their places."""

    def __init__(self, outs: dict[str, int], bias: bool) -> None:
        super().__init__()
        for name, out in outs.items():
            setattr(self, name, nn.Linear(FEATURES, out, bias=bias))


def adapted(outs: dict[str, int], variant: str, rank: int) -> list[Any]:
    """PEFT's layers with no parameter at its starting value, which could hide a mistake."""
    torch.manual_seed(0)
    config = {"target_modules": list(outs), **VARIANTS[variant]}
    for key in ("target_modules", "rank_pattern", "alpha_pattern"):  # of the linears there are
        if isinstance(given := config.get(key), dict):
            config[key] = {name: value for name, value in given.items() if name in outs}
        elif given is not None:
            config[key] = [name for name in given if name in outs]
    model = peft.inject_adapter_in_model(
        peft.LoraConfig(r=rank, lora_alpha=12, **config), Linears(outs, "bias" in variant)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
            elif parameter.requires_grad:
                parameter.normal_(std=0.2)
            elif name.endswith("bias"):
                parameter.normal_()
    return list(model.children())


def drop_as_the_engine_does(modules: list[Any], seed: int) -> None:
    """Gives PEFT's dropout layers the masks that a group draws after `torch.manual_seed(seed)`."""
    torch.manual_seed(seed)
    dropout = ops.Dropout(DROPOUT, int(torch.randint(2**62, ()).item()))
    for stream, module in enumerate(modules):
        layer = module.lora_dropout["default"]
        layer.forward = lambda x, stream=stream: reference.drop(x, dropout, stream)


def outputs_and_gradients(outputs: Any, modules: list[Any], x: Tensor) -> dict[str, Tensor]:
    """The outputs, and the gradients of x and of all that is trained, by name."""
    leaves = {
        f"{i}.{name}": parameter
        for i, module in enumerate(modules)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    generator = torch.Generator().manual_seed(2)
    loss = sum((y * torch.randn(y.shape, generator=generator).to(y)).sum() for y in outputs)
    grads = torch.autograd.grad(loss, [x, *leaves.values()])
    found = dict(zip(("x", *leaves), grads, strict=True))
    return {**{f"y{i}": y for i, y in enumerate(outputs)}, **found}


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("outs", GROUPS)
def test_outputs_and_all_gradients_are_peft_s(outs: str, variant: str, rank: int) -> None:
    modules = adapted(GROUPS[outs], variant, rank)
    x = torch.randn(2, 9, FEATURES, requires_grad=True)
    plain = copy.deepcopy(modules)
    if variant == "dropout":
        drop_as_the_engine_does(plain, seed=7)
    theirs = outputs_and_gradients([module(x) for module in plain], plain, x)
    group = LinearGroup(modules, Patches(), AdapterRouter(), torch.float32)
    assert group.reason is None and group.ready(x)
    torch.manual_seed(7)
    ours = outputs_and_gradients(group(x), modules, x)
    torch.manual_seed(7)
    again = outputs_and_gradients(group(x), modules, x)
    assert ours.keys() == theirs.keys() and len(ours) > 3
    for name, expected in theirs.items():
        assert error(ours[name], expected) < 2e-5, name
        assert torch.equal(ours[name], again[name]), f"{name} differs between two runs"


def test_dropout_drops() -> None:
    """What the comparison above would not see if both sides forgot to."""
    modules = adapted(GROUPS["three"], "dropout", 8)
    group = LinearGroup(modules, Patches(), AdapterRouter(), torch.float32)
    x = torch.randn(5, FEATURES)
    first, second = group(x), group(x)
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for module in modules:
        module.eval()
    assert all(
        torch.allclose(y, module(x), atol=1e-5) for y, module in zip(group(x), modules, strict=True)
    )
