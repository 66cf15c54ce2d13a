"""Variants of the LoRA linear on every implementation: the reference's results and gradients."""

from typing import Any

import pytest
import torch
from adapted_linears import Linears, group_of
from implementations import CPU, Backend
from oracle import check
from torch import Tensor

from lora_engine import backends, ops, reference
from lora_engine.testing import error

OPERATION = "lora_linear"
ROWS, FEATURES, OUTS = 23, 40, (24, 8, 8)
VARIANTS = ("lora", "dropout", "dora", "several", "routes", "partial", "bias", "lora_bias")


@pytest.mark.reference
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(backend: Backend, dtype: torch.dtype, poisoned: None, variant: str) -> None:
    check_variant(backend, dtype, variant)


def check_variant(backend: Backend, dtype: torch.dtype, variant: str) -> None:
    torch.manual_seed(0)
    kind = {"dropout": "lora", "routes": "several"}.get(variant, variant)
    linears = Linears.make(backend, OUTS, FEATURES, dtype, kind)
    options: dict[str, Any] = {}
    if variant == "dropout":
        options["dropout"] = ops.Dropout(0.3, 1234567890123)
    if variant == "routes":
        options["routes"] = torch.arange(ROWS, device=backend.device) % 3 - 1

    def ours(x: Tensor, *leaves: Tensor) -> Tensor:
        group = group_of(linears.take(iter(leaves), x.dtype))
        return torch.cat(ops.lora_linear(x, group, impl=backend.impl, **options), -1)

    def formula(x: Tensor, *leaves: Tensor) -> Tensor:
        plain = linears.take(iter(leaves), x.dtype)
        return torch.cat(reference.lora_group(x, plain, **options), -1)

    (x,) = backend.put(torch.randn(ROWS, FEATURES).to(dtype))
    check(ours, formula, [x, *linears.leaves], alone=False)


@pytest.mark.parametrize("variant", ["lora", "dropout", "dora", "bias"])
@pytest.mark.parametrize("strategy", backends.STRATEGIES)
def test_strategies_agree(
    backend: Backend, poisoned: None, monkeypatch: pytest.MonkeyPatch, variant: str, strategy: str
) -> None:
    """Forced, whatever the table says; a masked product cannot be augmented."""
    if strategy == "augmented" and variant == "dropout":
        strategy = "two_segment"
    monkeypatch.setattr(backends, "product_strategy", lambda *args: strategy)
    check_variant(backend, torch.float32, variant)


def leaf(backend: Backend, *shape: int) -> Tensor:
    return torch.randn(shape).to(backend.device).requires_grad_()


def factors(backend: Backend, n: int, rank: int, dora: bool = False) -> ops.LoraFactors:
    magnitude = leaf(backend, n).detach().abs().requires_grad_() if dora else None
    return ops.LoraFactors(leaf(backend, rank, FEATURES), leaf(backend, n, rank), 0.5, magnitude)


def group(backend: Backend) -> ops.LoraGroup:
    weights = [(torch.randn(n, FEATURES) * FEATURES**-0.5).to(backend.device) for n in OUTS]
    return ops.LoraGroup.dense(weights, [factors(backend, n, 4) for n in OUTS])


def test_dropout_of_the_same_seed_is_the_same(backend: Backend) -> None:
    weight, x = group(backend), leaf(backend, ROWS, FEATURES)
    results = [
        ops.lora_linear(x, weight, dropout=ops.Dropout(0.5, seed), impl=backend.impl)[0]
        for seed in (7, 7, 8)
    ]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_room_is_for_other_adapters_too(backend: Backend) -> None:
    weight, x = group(backend), leaf(backend, ROWS, FEATURES)
    others = [factors(backend, OUTS[0], 6), None, factors(backend, OUTS[2], 5)]
    weight.set_adapters(others)
    ours = torch.cat(ops.lora_linear(x, weight, impl=backend.impl), -1)
    theirs = torch.cat(ops.lora_linear(x, weight, impl="reference"), -1)
    assert error(ours, theirs) < 1e-5
    with pytest.raises(ValueError, match="together exceed the group's capacity of 12"):
        weight.set_adapters([factors(backend, n, 5) for n in OUTS])


def test_misuse_is_refused() -> None:
    cpu = Backend("cpu", CPU)
    weight = group(cpu)
    with pytest.raises(ValueError, match=r"routes \[4\] int64 do not fit x \[5, 40\]"):
        ops.lora_linear(torch.randn(5, FEATURES), weight, routes=torch.zeros(4, dtype=torch.int64))
    two = [factors(cpu, 24, 2, dora=True), factors(cpu, 24, 2)]
    with pytest.raises(ValueError, match="several adapters, one of them DoRA"):
        ops.LoraGroup.dense([torch.randn(24, FEATURES)], [two])
