"""Whoever writes a parameter, and however: an accelerated model computes with what was written."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lora_engine
from lora_engine.testing import tiny_llama, with_lora

IDS = torch.arange(3, 43).view(2, 20)
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "all"},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "norms": {"modules_to_save": ["input_layernorm", "norm"]},
}

Writer = Callable[[nn.Module], None]


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def change(name: str, p: torch.Tensor) -> torch.Tensor:
    """Other values, the same for the same name."""
    generator = torch.Generator().manual_seed(len(name))
    return p.detach() * 0.5 + 0.02 * torch.randn(p.shape, generator=generator)


def through_data(model: nn.Module) -> None:
    for name, p in trained(model):
        p.data.copy_(change(name, p))


def other_data(model: nn.Module) -> None:
    for name, p in trained(model):
        p.data = change(name, p)


def swapped_back(model: nn.Module) -> None:
    """As averages of weights are swapped in and out: the storage that was there first returns."""
    other_data(model)
    model(IDS)
    for name, p in trained(model):
        p.data = change(name + "x", p)


def through_numpy(model: nn.Module) -> None:
    for name, p in trained(model):
        p.detach().numpy()[...] = change(name, p).numpy()


def without_grad(model: nn.Module) -> None:
    with torch.no_grad():
        for name, p in trained(model):
            p.copy_(change(name, p))


def loaded(model: nn.Module) -> None:
    values = {name: change(name, p) for name, p in trained(model)}
    model.load_state_dict(values, strict=False)


def assigned(model: nn.Module) -> None:
    values = {name: change(name, p) for name, p in trained(model)}
    model.load_state_dict(values, strict=False, assign=True)


def exchanged(model: nn.Module) -> None:
    for name, p in trained(model):
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, attribute, nn.Parameter(change(name, p)))


WRITERS = (
    through_data,
    other_data,
    swapped_back,
    through_numpy,
    without_grad,
    loaded,
    assigned,
    exchanged,
)


def pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    """An accelerated model and a plain copy of it."""
    plain = with_lora(tiny_llama(attention_bias=True), **{"init_lora_weights": False, **options})
    ours = copy.deepcopy(plain)
    lora_engine.accelerate(ours)
    ours(IDS)  # what a cache would keep, it keeps
    return ours.eval(), plain.eval()


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_next_result_is_that_of_what_was_written(variant: str, write: Writer) -> None:
    ours, plain = pair(**VARIANTS[variant])
    before = plain(IDS).logits
    write(ours), write(plain)
    expected = plain(IDS).logits
    assert not torch.allclose(before, expected, atol=1e-3)
    assert torch.allclose(ours(IDS).logits, expected, atol=1e-5)


def optimizers() -> dict[str, Callable[[Any], torch.optim.Optimizer]]:
    return {
        "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
        "adamw_loop": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
        "sgd_fused": lambda p: torch.optim.SGD(p, lr=1.0, fused=True),
    }


@pytest.mark.parametrize("name", optimizers())
@pytest.mark.parametrize("variant", ["lora", "dora", "head"])
def test_steps_of_torch_s_optimizers_count(variant: str, name: str) -> None:
    losses = []
    for model in pair(**VARIANTS[variant]):
        model.train()
        optimizer = optimizers()[name]([p for _, p in trained(model)])
        losses.append([])
        for _ in range(4):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[1][-1] < 0.99 * losses[1][0]


@pytest.mark.parametrize("write", [without_grad, through_data, assigned])
def test_base_weights_too(write: Writer) -> None:
    ours, plain = pair()
    for model in (ours, plain):
        for _, p in model.named_parameters():
            p.requires_grad_("base_layer" in _)
    write(ours), write(plain)
    for model in (ours, plain):
        model.requires_grad_(False)
    assert torch.allclose(ours(IDS).logits, plain(IDS).logits, atol=1e-5)
