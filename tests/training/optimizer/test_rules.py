"""Lion, Adafactor and weights that are rounded at random, beside their definitions."""

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from lora_engine.training.config import TrainConfig
from lora_engine.training.optimizer.choice import flat_optimizer
from lora_engine.training.optimizer.flat import FlatParameters
from lora_engine.training.optimizer.rounding import stochastically_rounded

SHAPES = [(5, 3), (7,), (2, 4, 6), ()]


def parameters_of(shapes, dtype=torch.float32):
    torch.manual_seed(1)
    made = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    return [*made, nn.Parameter(torch.randn(9, 4).to(dtype).t())]  # one that is transposed


def steps(parameters, config, *, count, chunk=None, **layout):
    """Gradients of `count` steps, which `optimizer` has applied to `parameters`."""
    flat = FlatParameters([(f"p{i}", p) for i, p in enumerate(parameters)], **layout)
    optimizer = flat_optimizer(flat, config)
    optimizer.chunk = chunk or optimizer.chunk
    draws = torch.Generator().manual_seed(2)
    applied = []
    for step in range(count):
        flat.zero_grad()
        gradients = [torch.randn(p.shape, generator=draws) for p in parameters]
        scale = 10.0 if step % 2 else 1e-2  # clipped every other step
        for entry, gradient in zip(flat.entries, gradients, strict=True):
            entry.view(flat.grad).copy_(scale * gradient)
        optimizer.step(0.1 / (step + 1), optimizer.grad_norm())
        norm = torch.stack([(scale * g).norm() for g in gradients]).norm()
        applied.append([scale * g / max(1.0, norm.item() / 0.5) for g in gradients])
    return optimizer, applied


@pytest.mark.parametrize("chunk", [4, None])
def test_lion_takes_steps_of_the_interpolated_sign(chunk):
    config = TrainConfig(optimizer="lion", weight_decay=0.1, beta1=0.8, max_grad_norm=0.5)
    assert (config.beta1, config.beta2) == (0.8, 0.99)
    ours = parameters_of(SHAPES)
    expected = [p.detach().double() for p in ours]
    _, applied = steps(ours, config, count=6, chunk=chunk)
    moments = [torch.zeros_like(p) for p in expected]
    for step, gradients in enumerate(applied):
        lr = 0.1 / (step + 1)
        for p, m, g in zip(expected, moments, gradients, strict=True):
            p.mul_(1 - lr * 0.1).sub_(lr * torch.sign(0.8 * m + 0.2 * g))
            m.mul_(0.99).add_(0.01 * g)
    for p, q in zip(ours, expected, strict=True):
        torch.testing.assert_close(p.detach().double(), q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [4, None])
def test_adafactor_is_transformers_with_a_given_learning_rate(chunk):
    config = TrainConfig(optimizer="adafactor", weight_decay=0.1, max_grad_norm=0.5)
    ours = parameters_of(SHAPES)
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer, applied = steps(ours, config, count=6, chunk=chunk)
    oracle = Adafactor(theirs, lr=1.0, weight_decay=0.1, scale_parameter=False, relative_step=False)
    for step, gradients in enumerate(applied):
        oracle.param_groups[0]["lr"] = 0.1 / (step + 1)
        for p, gradient in zip(theirs, gradients, strict=True):
            p.grad = gradient
        oracle.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=1e-6)
    assert sum(x.numel() for x in optimizer.buffers()) == 8 + 7 + (8 + 12) + 1 + 13


def test_states_are_told_by_names_and_shapes():
    for name in ("lion", "adafactor", "adamw"):
        config = TrainConfig(optimizer=name)
        first, _ = steps(parameters_of(SHAPES), config, count=2)
        second, _ = steps(parameters_of(SHAPES), config, count=1)
        second.load(first.tensors().__getitem__)
        for a, b in zip(first.buffers(), second.buffers(), strict=True):
            assert torch.equal(a, b) and a.any()


def test_rounding_at_random_is_right_on_average_and_takes_a_neighbour():
    values = torch.tensor([1.0, 1.0 + 2**-9, -3.1415926, 1e-40, 3.0e38]).repeat(20_000, 1)
    rounded = stochastically_rounded(values, (0, 1, 2))
    assert torch.equal(rounded, stochastically_rounded(values, (0, 1, 2)))
    assert not torch.equal(rounded, stochastically_rounded(values, (0, 2, 2)))
    down = (values.view(torch.int32) & ~0xFFFF).view(torch.float32)
    up = ((values.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)
    wide = rounded.float()
    assert ((wide == down) | (wide == up)).all()
    assert torch.equal(rounded[:, 0].float(), values[:, 0])  # exact ones stay
    spread = (up - down).abs()[0].double()
    error = (wide.double().mean(0) - values[0].double()).abs()
    assert (error <= 5 * spread * 0.5 / 20_000**0.5).all()
    special = torch.tensor([torch.inf, -torch.inf, torch.nan])
    kept = stochastically_rounded(special, (0,))
    assert torch.equal(kept[:2].float(), special[:2]) and kept[2].isnan()


def test_updates_too_small_for_bfloat16_add_up():
    """Each is 1/16 of the distance between neighbours: rounded to nearest none would count."""
    config = TrainConfig(optimizer="lion", rounding="stochastic", max_grad_norm=None)
    weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    flat = FlatParameters([("p", weight)], masters=False)
    assert flat.data.dtype == torch.bfloat16 and flat.data.data_ptr() == weight.data_ptr()
    optimizer = flat_optimizer(flat, config)
    for _ in range(32):
        flat.grad.fill_(1.0)
        optimizer.step(2**-12, optimizer.grad_norm())
    assert weight.detach().float().mean().item() == pytest.approx(1 - 32 * 2**-12, abs=3e-4)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "lion", "adafactor"])
def test_weights_without_masters_follow_those_in_float32(name):
    config = TrainConfig(optimizer=name, rounding="stochastic", max_grad_norm=0.5)
    shapes = [(64, 40), (30,)]
    exact, rounded = parameters_of(shapes), parameters_of(shapes, torch.bfloat16)
    steps(exact, config, count=6)
    optimizer, _ = steps(rounded, config, count=6, masters=False)
    assert all(p.dtype == torch.bfloat16 for p in rounded)
    for p, q in zip(exact, rounded, strict=True):
        torch.testing.assert_close(q.float(), p, rtol=0.05, atol=0.05)
    padding = torch.ones_like(optimizer.flat.data, dtype=torch.bool)
    for entry in optimizer.flat.entries:
        entry.view(padding)[...] = False
    assert padding.any() and not optimizer.flat.data[padding].any()
