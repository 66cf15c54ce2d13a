"""Variants of the LoRA linear on every implementation: the reference's results and gradients."""

from typing import Any

import pytest
import torch
from implementations import Backend
from torch import Tensor

from lora_engine import backends, ops
from lora_engine.testing import error

OPERATION = "lora_linear"
ROWS, FEATURES, OUTS = 23, 40, (24, 8, 8)


def leaf(backend: Backend, *shape: int) -> Tensor:
    return torch.randn(shape).to(backend.device).requires_grad_()


def factors(backend: Backend, n: int, rank: int, adapter: int = 0, dora: bool = False) -> Any:
    magnitude = leaf(backend, n).detach().abs().requires_grad_() if dora else None
    pair = leaf(backend, rank, FEATURES), leaf(backend, n, rank)
    return ops.LoraFactors(*pair, 0.5, magnitude, adapter)


def group(backend: Backend, kind: str) -> ops.LoraGroup:
    weights = [(torch.randn(n, FEATURES) * FEATURES**-0.5).to(backend.device) for n in OUTS]
    adapters: list[Any] = [factors(backend, n, 4, dora=kind == "dora") for n in OUTS]
    if kind in ("several", "routes"):
        adapters = [[factors(backend, n, 3, 0), factors(backend, n, 5, 1)] for n in OUTS]
    if kind == "partial":
        adapters[1] = None
    biases = [leaf(backend, n) for n in OUTS] if kind == "bias" else None
    return ops.LoraGroup.dense(weights, adapters, biases)


KINDS = ("plain", "dropout", "dora", "several", "routes", "partial", "bias")


@pytest.mark.parametrize("kind", KINDS)
def test_variants(backend: Backend, poisoned: None, kind: str) -> None:
    check_variant(backend, kind)


def check_variant(backend: Backend, kind: str) -> None:
    torch.manual_seed(0)
    weight, x = group(backend, kind), leaf(backend, ROWS, FEATURES)
    options: dict[str, Any] = {}
    if kind == "dropout":
        options["dropout"] = ops.Dropout(0.3, 1234567890123)
    if kind == "routes":
        options["routes"] = torch.arange(ROWS, device=backend.device) % 3 - 1
    leaves = [x, *(t for t in weight.tensors() if t is not None)]
    ours = torch.cat(ops.lora_linear(x, weight, impl=backend.impl, **options), -1)
    theirs = torch.cat(ops.lora_linear(x, weight, impl="reference", **options), -1)
    assert error(ours, theirs) < 1e-5
    dy = torch.randn(ours.shape).to(backend.device)
    grads = torch.autograd.grad(ours, leaves, dy)
    expected = torch.autograd.grad(theirs, leaves, dy)
    for i, (mine, plain) in enumerate(zip(grads, expected, strict=True)):
        assert error(mine, plain) < 1e-5, f"gradient {i}"


@pytest.mark.parametrize("kind", ["plain", "dropout", "dora", "bias"])
@pytest.mark.parametrize("strategy", backends.STRATEGIES)
def test_strategies_agree(
    backend: Backend, poisoned: None, monkeypatch: pytest.MonkeyPatch, kind: str, strategy: str
) -> None:
    """Forced, whatever the table says; a masked product cannot be augmented."""
    if strategy == "augmented" and kind == "dropout":
        strategy = "two_segment"
    monkeypatch.setattr(backends, "product_strategy", lambda *args: strategy)
    check_variant(backend, kind)


def test_dropout_of_the_same_seed_is_the_same(backend: Backend) -> None:
    weight, x = group(backend, "plain"), leaf(backend, ROWS, FEATURES)
    results = [
        ops.lora_linear(x, weight, dropout=ops.Dropout(0.5, seed), impl=backend.impl)[0]
        for seed in (7, 7, 8)
    ]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_room_is_for_other_adapters_too(backend: Backend) -> None:
    weight, x = group(backend, "plain"), leaf(backend, ROWS, FEATURES)
    others = [factors(backend, OUTS[0], 6), None, factors(backend, OUTS[2], 5)]
    weight.set_adapters(others)
    ours = torch.cat(ops.lora_linear(x, weight, impl=backend.impl), -1)
    theirs = torch.cat(ops.lora_linear(x, weight, impl="reference"), -1)
    assert error(ours, theirs) < 1e-5
    with pytest.raises(ValueError, match="together exceed the group's capacity of 12"):
        weight.set_adapters([factors(backend, n, 5) for n in OUTS])


def test_misuse_is_refused() -> None:
    cpu = Backend("cpu", torch.device("cpu"))
    weight = group(cpu, "plain")
    with pytest.raises(ValueError, match=r"routes \[4\] int64 do not fit x \[5, 40\]"):
        ops.lora_linear(torch.randn(5, FEATURES), weight, routes=torch.zeros(4, dtype=torch.int64))
    two = [factors(cpu, 24, 2, dora=True), factors(cpu, 24, 2)]
    with pytest.raises(ValueError, match="several adapters, one of them DoRA"):
        ops.LoraGroup.dense([torch.randn(24, FEATURES)], [two])
