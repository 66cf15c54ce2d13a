"""Gradients that are not the loss's: each fails before the run, also where the loss falls."""

import pytest
import torch
from training_helpers import (
    accelerated,
    layer,
    make_examples,
    one_batch,
    rows,
    tiny_llama,
    tiny_lora,
)

from lora_engine import UserError, preflight


def change_gradients(model, change, of=""):
    """Replaces the gradients of all trained parameters with `of` in their names."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and of in name:
            parameter.register_hook(change)
    return model


def noise(gradient):
    draws = torch.Generator().manual_seed(gradient.numel())
    return torch.randn(gradient.shape, generator=draws).to(gradient.dtype)


def quiet_noise(gradient):
    """As large as the gradient."""
    return noise(gradient) * gradient.norm() / gradient.numel() ** 0.5


def rows_of_others(gradient):
    return gradient.roll(1, 0)


def half_turned(gradient):
    turned = gradient.clone()
    turned.view(-1)[::2] *= -1
    return turned


def named(choice):
    return getattr(choice, "__name__", None)


MODELS = {"lora": tiny_lora, "full": lambda dtype=torch.float32: tiny_llama(dtype)}


def problem_of(model, batch):
    with pytest.raises(UserError) as caught:
        preflight(model, batch)
    line = str(caught.value)
    assert line.startswith("preflight: ") and "\n" not in line
    return line


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (noise, "full"),
        (quiet_noise, "lora"),
        (rows_of_others, "lora"),
        (half_turned, "full"),
        (torch.neg, "lora"),
        (torch.neg, "full"),
    ],
    ids=named,
)
def test_all_are_wrong(change, kind):
    line = problem_of(change_gradients(MODELS[kind](), change), rows())
    assert "does not fall on a repeated batch" in line
    assert "gradients" in line and "wrong" in line


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (noise, "layers.1.mlp.down_proj.lora_B"),
        (quiet_noise, "layers.0.self_attn.q_proj.lora_A"),
        (rows_of_others, "layers.1.mlp.down_proj.lora_B"),
        (half_turned, "layers.0.self_attn.q_proj.lora_A"),
        (torch.neg, "layers.1.mlp.down_proj.lora_B"),
    ],
    ids=named,
)
def test_one_of_an_adapter_is_wrong(change, name):
    line = problem_of(change_gradients(tiny_lora(), change, name), rows())
    assert f"{name}.default.weight is wrong" in line


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (quiet_noise, "layers.0.mlp.gate_proj"),
        (torch.neg, "layers.1.input_layernorm"),
        (quiet_noise, "embed_tokens"),
    ],
    ids=named,
)
def test_one_of_a_whole_model_is_wrong(change, name):
    line = problem_of(change_gradients(tiny_llama(), change, name), rows())
    assert f"{name}.weight is wrong" in line


def test_one_is_wrong_in_packed_batches():
    model = change_gradients(tiny_lora(), torch.neg, "layers.1.mlp.down_proj.lora_B")
    line = problem_of(accelerated(model), one_batch(make_examples(6)))
    assert "layers.1.mlp.down_proj.lora_B.default.weight is wrong" in line


@pytest.mark.parametrize(
    ("change", "kind"), [(noise, "lora"), (torch.neg, "lora"), (torch.neg, "full")], ids=named
)
def test_all_are_wrong_in_bfloat16(change, kind):
    line = problem_of(change_gradients(MODELS[kind](dtype=torch.bfloat16), change), rows())
    assert "does not fall" in line


def test_a_part_is_wrong_in_bfloat16():
    line = problem_of(change_gradients(tiny_llama(torch.bfloat16), torch.neg, "mlp"), rows())
    assert "does not fall" in line and "mlp" in line


@pytest.mark.parametrize(
    ("kind", "factor"), [("lora", 1e30), ("full", 1e6), ("lora", 1e-6), ("full", 1e-30)]
)
def test_a_scale_that_is_not_divided_out(kind, factor):
    model = change_gradients(MODELS[kind](), lambda gradient: gradient * factor)
    line = problem_of(model, rows())
    word = f"{factor:.0e} times too large" if factor > 1 else f"{1 / factor:.0e} times too small"
    assert word in line and "scale of the loss" in line


def larger(gradient):
    return gradient * 16


def smaller(gradient):
    return gradient / 16


def clipped(gradient):
    return gradient.clamp(-1e-3, 1e-3)


def normalised(gradient):
    return gradient / gradient.norm().clamp(min=1e-9)


def a_little_noisy(gradient):
    return gradient + 0.1 * quiet_noise(gradient)


@pytest.mark.parametrize(
    ("change", "of"),
    [
        (larger, ""),
        (larger, "lora_B"),
        (smaller, "lora_B"),
        (clipped, ""),
        (clipped, "lora_B"),
        (normalised, ""),
        (a_little_noisy, ""),
    ],
    ids=named,
)
def test_scales_that_people_choose_pass(change, of):
    model = change_gradients(tiny_lora(), change, of)
    report = preflight(model, rows())
    assert report.loss_after < 0.99 * report.loss_before


def passes(model):
    """How many forward passes preflight makes."""
    made = []
    layer(model).register_forward_hook(lambda *_: made.append(1))
    preflight(model, rows())
    return len(made)


def test_gradients_that_say_too_little_cost_nothing():
    halved = change_gradients(tiny_lora(), lambda gradient: gradient / 2, "down_proj.lora_B")
    assert passes(halved) == passes(tiny_lora()) == 8
