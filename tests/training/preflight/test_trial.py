"""A tried model is left as it was, whatever ends the try."""

import random

import numpy as np
import peft
import pytest
import torch
from torch import nn
from training_helpers import (
    assert_same_bits,
    layer,
    rows,
    tiny_lora,
)
from two_adapters import two_adapters

from lora_engine import UserError, accelerate, preflight
from lora_engine.objectives.sft import SFT
from lora_engine.training.preflight.trial import trial


class Norm(nn.BatchNorm1d):
    """Changes its buffers, and itself, in every pass."""

    calls = 0

    def __init__(self, size):
        super().__init__(size)
        self.register_buffer("counts", torch.zeros(3, dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        self.counts += 1
        return super().forward(x.flatten(0, 1)).view_as(x)


def restless_model():
    """With dropout, gradients, changing buffers, some parts in training and some not."""
    model = tiny_lora(dropout=0.2)
    layer(model).post_attention_layernorm = Norm(32).requires_grad_(False)
    model.eval()
    layer(model).mlp.train()
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter) if parameter.requires_grad else None
    return model


def everything(model):
    """Values, gradients, modes, attributes and generators."""
    state = {name: x.clone() for name, x in model.state_dict().items()}
    state |= {
        f"grad {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }
    state["modes"] = torch.tensor([module.training for module in model.modules()])
    state["calls"] = torch.tensor(getattr(layer(model).post_attention_layernorm, "calls", 0))
    state["torch"] = torch.get_rng_state()
    state["numpy"] = torch.from_numpy(np.random.get_state()[1].astype(np.int64))  # noqa: NPY002
    state["python"] = torch.tensor(random.getstate()[1])
    return state


def stop_in_pass(model, number, error):
    """Raises `error` in the middle of one of the forward passes."""
    left = [number]

    def hook(*args):
        left[0] -= 1
        if left[0] == 0:
            raise error

    layer(model).register_forward_pre_hook(hook)


@pytest.mark.parametrize(
    ("end", "fast"),
    [
        ("passes", False),
        ("passes", True),
        ("fails", True),
        ("fails late", False),
        ("interrupted", False),
        ("interrupted late", True),
    ],
)
def test_the_model_is_left_as_it_was(end, fast):
    model = restless_model()
    if fast:
        accelerate(model)
    batch = rows()
    if end == "fails":
        layer(model).mlp.register_forward_hook(lambda module, args, output: output.detach())
    elif end == "fails late":
        layer(model).mlp.up_proj.lora_A["default"].weight.register_hook(torch.neg)
    elif end != "passes":
        stop_in_pass(model, 1 if end == "interrupted" else 7, KeyboardInterrupt())
    before, gradients = everything(model), [p.grad for p in model.parameters()]
    tensors = {key: value.clone() for key, value in batch.items()}
    error = {"passes": None, "fails": UserError, "fails late": UserError}.get(
        end, KeyboardInterrupt
    )
    if error is None:
        assert preflight(model, batch).loss_after > 0
    else:
        with pytest.raises(error):
            preflight(model, batch)
    assert_same_bits(everything(model), before)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert_same_bits(batch, tensors)


def test_an_interrupt_while_all_is_put_back(monkeypatch):
    model = restless_model()
    before = everything(model)
    with pytest.raises(KeyboardInterrupt), trial(model, rows(), SFT()) as tried:
        tried.shake(list(tried.trained))
        put = tried._put

        def interrupted(values):
            monkeypatch.setattr(tried, "_put", put)
            next(iter(tried.trained.values())).zero_()
            raise KeyboardInterrupt

        monkeypatch.setattr(tried, "_put", interrupted)
    assert_same_bits(everything(model), before)


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "accelerated"])
def test_dropout_draws_the_same_in_every_pass(fast):
    model = two_adapters(["default"]) if fast else tiny_lora()
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.lora_dropout["default"] = nn.Dropout(0.5)
            nn.init.normal_(module.lora_B["default"].weight)
    with trial(model, rows(), SFT()) as tried:
        first = tried.loss()
        assert tried.loss() == first
    torch.manual_seed(1)  # other draws give another loss
    assert model.train()(**rows()).loss.item() != first


def test_optimisers_in_the_backward_pass_do_not_step():
    model, stepped = tiny_lora(), []
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(stepped.append)
    preflight(model, rows())
    assert not stepped
    model(**rows()).loss.backward()
    assert len(stepped) == 28


def test_autocast_does_not_keep_the_weights_of_an_earlier_pass():
    model = tiny_lora(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        report = preflight(model, rows())
    assert report.loss_after < 0.99 * report.loss_before
