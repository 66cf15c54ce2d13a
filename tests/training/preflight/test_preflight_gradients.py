"""Gradients that are not the loss's: each fails before the run, also where the loss falls."""

import pytest
import torch
from training_helpers import (
    accelerated,
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


WRONG = [noise, quiet_noise, rows_of_others, half_turned, torch.neg]
MODELS = {"lora": tiny_lora, "full": lambda dtype=torch.float32: tiny_llama(dtype)}


def problem_of(model, batch):
    with pytest.raises(UserError) as caught:
        preflight(model, batch)
    line = str(caught.value)
    assert line.startswith("preflight: ") and "\n" not in line
    return line


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.__name__)
def test_all_are_wrong(change, kind):
    line = problem_of(change_gradients(MODELS[kind](), change), rows())
    assert "does not fall on a repeated batch" in line
    assert "gradients" in line and "wrong" in line


@pytest.mark.parametrize(
    "name", ["layers.1.mlp.down_proj.lora_B", "layers.0.self_attn.q_proj.lora_A"]
)
@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.__name__)
def test_one_of_an_adapter_is_wrong(change, name):
    line = problem_of(change_gradients(tiny_lora(), change, name), rows())
    assert f"{name}.default.weight is wrong" in line


@pytest.mark.parametrize(
    "name", ["layers.0.mlp.gate_proj", "layers.1.input_layernorm", "embed_tokens"]
)
@pytest.mark.parametrize("change", [quiet_noise, torch.neg], ids=lambda change: change.__name__)
def test_one_of_a_whole_model_is_wrong(change, name):
    line = problem_of(change_gradients(tiny_llama(), change, name), rows())
    assert f"{name}.weight is wrong" in line


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "accelerated"])
def test_one_is_wrong_in_packed_batches(fast):
    model = change_gradients(tiny_lora(), torch.neg, "layers.1.mlp.down_proj.lora_B")
    model = accelerated(model) if fast else model
    line = problem_of(model, one_batch(make_examples(6)))
    assert "layers.1.mlp.down_proj.lora_B.default.weight is wrong" in line


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("change", [noise, torch.neg], ids=lambda change: change.__name__)
def test_all_are_wrong_in_bfloat16(change, kind):
    line = problem_of(change_gradients(MODELS[kind](dtype=torch.bfloat16), change), rows())
    assert "does not fall" in line


def test_a_part_is_wrong_in_bfloat16():
    line = problem_of(change_gradients(tiny_llama(torch.bfloat16), torch.neg, "mlp"), rows())
    assert "does not fall" in line and "mlp" in line


@pytest.mark.parametrize("factor", [1e30, 1e6, 1e-6, 1e-30])
@pytest.mark.parametrize("kind", MODELS)
def test_a_scale_that_is_not_divided_out(kind, factor):
    model = change_gradients(MODELS[kind](), lambda gradient: gradient * factor)
    line = problem_of(model, rows())
    word = f"{factor:.0e} times too large" if factor > 1 else f"{1 / factor:.0e} times too small"
    assert word in line and "scale of the loss" in line


@pytest.mark.parametrize(
    "change",
    [
        lambda gradient: gradient * 16,
        lambda gradient: gradient / 16,
        lambda gradient: gradient.clamp(-1e-3, 1e-3),
        lambda gradient: gradient / gradient.norm().clamp(min=1e-9),
        lambda gradient: gradient + 0.1 * quiet_noise(gradient),
    ],
    ids=["larger", "smaller", "clipped", "normalised", "a little noise"],
)
@pytest.mark.parametrize("of", ["", "lora_B"], ids=["all", "B"])
def test_scales_that_people_choose_pass(change, of):
    model = change_gradients(tiny_lora(), change, of)
    report = preflight(model, rows())
    assert report.loss_after < 0.99 * report.loss_before
