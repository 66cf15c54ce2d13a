"""Modules that somebody hooks, patches or exchanges beside us do what he made them do."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lora_engine
from lora_engine import UserError
from lora_engine.testing import error, tiny_llama, with_lora

IDS = torch.arange(3, 43).view(2, 20)
EVERYWHERE = ["q_proj", "o_proj", "down_proj", "embed_tokens", "lm_head"]
PARTS = [
    "model.layers.0",
    "model.layers.0.input_layernorm",
    "model.layers.0.self_attn",
    "model.layers.0.self_attn.o_proj",
    "model.layers.0.self_attn.o_proj.base_layer",
    "model.layers.0.mlp",
    "model.layers.0.mlp.act_fn",
    "model.layers.0.mlp.down_proj",
    "model.layers.0.mlp.down_proj.lora_A.default",
    "model.layers.0.mlp.down_proj.lora_dropout.default",
    "model.norm",
    "model.embed_tokens",
    "model.embed_tokens.base_layer",
    "lm_head",
    "lm_head.base_layer",
    "lm_head.lora_B.default",
]


def scaled(output: Any) -> Any:
    return (output[0] * 3, *output[1:]) if isinstance(output, tuple) else output * 3


def hook(part: nn.Module) -> None:
    part.register_forward_hook(lambda module, args, output: scaled(output))


def patch(part: nn.Module) -> None:
    original = part.forward
    part.forward = lambda *args, **kwargs: scaled(original(*args, **kwargs))  # type: ignore


def recall(part: nn.Module) -> None:
    kind = type(part)
    part.__class__ = type(
        kind.__name__,
        (kind,),
        {"__call__": lambda self, *args, **kwargs: scaled(kind.__call__(self, *args, **kwargs))},
    )


def models(**options: Any) -> tuple[Any, Any]:
    """Two equal models."""
    options = {"target_modules": EVERYWHERE, "init_lora_weights": False, **options}
    # Weights of a size at which every part changes the loss.
    model = with_lora(tiny_llama(initializer_range=0.2), **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.normal_(std=0.5)
    return copy.deepcopy(model), model


def loss(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS, labels=IDS).loss
    return found


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("alter", [hook, patch, recall], ids=lambda alter: alter.__name__)
@pytest.mark.parametrize("name", PARTS)
def test_altered_parts_do_what_they_do(name: str, alter: Callable[..., None], when: str) -> None:
    ours, plain = models()
    unaltered = loss(plain)
    alter(plain.get_base_model().get_submodule(name))
    if when == "after":
        lora_engine.accelerate(ours)
        loss(ours)
    alter(ours.get_base_model().get_submodule(name))
    if when == "before":
        lora_engine.accelerate(ours)
    expected = loss(plain)
    assert error(unaltered, expected) > 1e-3
    assert error(loss(ours), expected) < 1e-5


def test_hooks_of_all_modules_see_every_module() -> None:
    seen: list[list[str]] = []
    for model in models():
        if not seen:
            lora_engine.accelerate(model)
        calls: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, output, to=calls: to.append(type(module).__name__)
        )
        try:
            loss(model)
        finally:
            handle.remove()
        seen.append(calls)
    assert seen[0] == seen[1]


def test_an_exchanged_activation_counts() -> None:
    ours, plain = models()
    lora_engine.accelerate(ours)
    for model in (ours, plain):
        model.get_base_model().model.layers[0].mlp.act_fn = nn.ReLU()
    assert error(loss(ours), loss(plain)) < 1e-5


def exchanged(model: Any) -> torch.Tensor:
    for module in model.modules():
        for holder in getattr(module, "lora_magnitude_vector", {}).values():
            holder.weight = nn.Parameter(holder.weight.detach() * 8)
    return loss(model)


def functional(model: Any) -> torch.Tensor:
    other = {n: p.detach() * 8 for n, p in model.named_parameters() if "magnitude" in n}
    given = {"input_ids": IDS, "labels": IDS}
    found: torch.Tensor = torch.func.functional_call(model, other, (), given).loss
    return found


@pytest.mark.parametrize("write", [exchanged, functional], ids=lambda write: write.__name__)
def test_magnitudes_alone_are_exchanged(write: Callable[[Any], torch.Tensor]) -> None:
    ours, plain = models(target_modules=["q_proj", "down_proj"], use_dora=True)
    lora_engine.accelerate(ours)
    before = loss(ours)
    expected = write(plain)
    assert error(before, expected) > 1e-3
    assert error(write(ours), expected) < 1e-5


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(model).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_padding_gives_an_embedding_no_gradient() -> None:
    target: dict[str, Any] = {"target_modules": ["embed_tokens"], "init_lora_weights": False}
    model = with_lora(tiny_llama(pad_token_id=5), **target)
    ours = copy.deepcopy(model)
    lora_engine.accelerate(ours)
    found, expected = gradients(ours), gradients(model)
    for name, grad in expected.items():
        assert error(found[name], grad) < 1e-4, name
        assert grad.any() and ("_A" not in name or not grad[:, 5].any())


def test_accelerated_in_inference_mode_it_trains() -> None:
    ours, plain = models()
    with torch.inference_mode():
        lora_engine.accelerate(ours)
        assert error(loss(ours), loss(plain)) < 1e-5
    expected = gradients(plain)
    assert all(error(grad, expected[name]) < 1e-4 for name, grad in gradients(ours).items())


@pytest.mark.parametrize("made", ["all of it", "the adapters"])
def test_what_was_made_in_inference_mode_is_refused_and_stays_as_it_was(made: str) -> None:
    with torch.inference_mode(made == "all of it"):
        base = tiny_llama()
    with torch.inference_mode():
        model = with_lora(base).eval()
        expected = model(input_ids=IDS).logits
    with pytest.raises(UserError, match=r"weight was made under torch.inference_mode"):
        lora_engine.accelerate(model)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("part", ["self_attn.q_proj", "mlp.gate_proj", "input_layernorm"])
@pytest.mark.parametrize("variant", [{}, {"use_dora": True, "target_modules": ["q_proj"]}], ids=str)
def test_autocast(variant: dict[str, Any], part: str) -> None:
    """Parts that we leave hand bfloat16 to those that are ours, whose weights are float32."""
    ours, plain = models(**variant)
    lora_engine.accelerate(ours)
    ours.get_base_model().model.layers[0].get_submodule(part).register_forward_hook(
        lambda module, args, output: None
    )
    exact = gradients(plain)
    scale = max(grad.abs().max() for grad in exact.values())
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(ours)
    found.backward()
    for name, p in ours.named_parameters():
        if name in exact:
            assert p.grad is not None and p.grad.dtype == p.dtype
            assert (p.grad - exact[name]).abs().max() < 0.2 * scale, name  # eight bits' rounding


def test_norms_kept_in_float32_under_a_bfloat16_model() -> None:
    """As `peft.prepare_model_for_kbit_training` leaves them."""
    ours, plain = models()
    for model in (ours, plain):
        model.to(torch.bfloat16)
    lora_engine.accelerate(ours)
    for model in (ours, plain):
        for name, p in model.named_parameters():
            if "norm" in name:
                p.data = p.data.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert error(loss(ours), loss(plain)) < 2e-2


def test_what_a_norm_or_a_window_is_set_to_afterwards_counts() -> None:
    torch.manual_seed(0)
    plain = with_lora(tiny_llama()).eval()
    model = copy.deepcopy(plain)
    lora_engine.accelerate(model)
    ids = torch.arange(3, 15)[None]
    before = model(input_ids=ids).logits
    for each in (model, plain):
        each.get_base_model().model.norm.variance_epsilon = 0.5
    ours, theirs = (each(input_ids=ids).logits for each in (model, plain))
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, before, atol=1e-3)
