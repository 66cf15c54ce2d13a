"""Products over any base weight are those over a dense one, with all their gradients."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from base_weights import BASES, group_over, kept
from implementations import Backend
from oracle import TOLERANCE
from torch import Tensor

from lora_engine import backends, ops
from lora_engine.testing import error

OPERATION = "lora_linear"
ROWS, FEATURES, OUTS = 19, 24, (16, 9, 8)
VARIANTS = ("lora", "dropout", "dora", "several", "routes", "partial", "bias", "lora_bias")


def leaf(backend: Backend, dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.randn(shape) * shape[-1] ** -0.5).to(backend.device, dtype).requires_grad_()


def adapters_of(backend: Backend, dtype: torch.dtype, n: int, variant: str) -> Any:
    def factors(rank: int, number: int = 0) -> ops.LoraFactors:
        lora_a, lora_b = leaf(backend, dtype, rank, FEATURES), leaf(backend, dtype, n, rank)
        vector = leaf(backend, dtype, n)
        if variant == "dora":
            return ops.LoraFactors(lora_a, lora_b, 0.5, vector)
        bias = vector if variant == "lora_bias" else None
        return ops.LoraFactors(lora_a, lora_b, 0.5, None, number, bias)

    if variant in ("several", "routes"):
        return [factors(3), factors(5, 1)]
    return None if variant == "partial" and n == OUTS[1] else factors(4)


def results(
    backend: Backend, group: ops.LoraGroup, x: Tensor, dy: Tensor, variant: str
) -> Sequence[Tensor]:
    """The outputs side by side, and the gradients of x and of all that the group trains."""
    options: dict[str, Any] = {}
    if variant == "dropout":
        options["dropout"] = ops.Dropout(0.3, 1234567890123)
    if variant == "routes":
        options["routes"] = torch.arange(ROWS, device=backend.device) % 3 - 1
    y = torch.cat(ops.lora_linear(x, group, impl=backend.impl, **options), -1)
    leaves = [x, *(t for t in group.tensors() if t is not None)]
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def check_base(backend: Backend, dtype: torch.dtype, base: str, variant: str) -> None:
    torch.manual_seed(0)
    weights = kept(base, [leaf(backend, dtype, n, FEATURES).detach() for n in OUTS])
    adapters = [adapters_of(backend, dtype, n, variant) for n in OUTS]
    biases = [leaf(backend, dtype, n) for n in OUTS] if variant == "bias" else None
    x, dy = leaf(backend, dtype, ROWS, FEATURES), leaf(backend, dtype, ROWS, sum(OUTS)).detach()
    ours, dense = (
        results(backend, group_over(kind, weights, adapters, biases), x, dy, variant)
        for kind in (base, "dense")
    )
    for i, (mine, expected) in enumerate(zip(ours, dense, strict=True)):
        assert error(mine, expected) < 5 * TOLERANCE[dtype], f"tensor {i}"


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_no_rows_are_zero(backend: Backend, variant: str, base: str) -> None:
    """As of a batch of which no row is left."""
    dtype = torch.float32
    weights = [leaf(backend, dtype, n, FEATURES).detach() for n in OUTS]
    adapters = [adapters_of(backend, dtype, n, variant) for n in OUTS]
    biases = [leaf(backend, dtype, n) for n in OUTS] if variant == "bias" else None
    group = group_over(base, weights, adapters, biases)
    x = leaf(backend, dtype, 0, FEATURES)
    routes = torch.zeros(0, dtype=torch.int64, device=x.device) if variant == "routes" else None
    dropout = ops.Dropout(0.3, 7) if variant == "dropout" else None
    y = torch.cat(ops.lora_linear(x, group, impl=backend.impl, dropout=dropout, routes=routes), -1)
    assert y.shape == (0, sum(OUTS))
    leaves = [x, *(t for t in group.tensors() if t is not None)]
    for tensor, gradient in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert gradient.shape == tensor.shape and not gradient.any()


every_other_base = pytest.mark.parametrize("base", [kind for kind in BASES if kind != "dense"])


@every_other_base
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(
    backend: Backend, dtype: torch.dtype, poisoned: None, variant: str, base: str
) -> None:
    check_base(backend, dtype, base, variant)


@every_other_base
@pytest.mark.parametrize("variant", ["lora", "dropout", "dora", "bias"])
@pytest.mark.parametrize("strategy", backends.STRATEGIES)
def test_strategies(
    backend: Backend,
    poisoned: None,
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
    base: str,
    strategy: str,
) -> None:
    """Forced; a masked product and one of blocks cannot be augmented."""
    lent = BASES[base]([torch.zeros(8, FEATURES)], 0).is_augmentable
    if strategy == "augmented" and (variant == "dropout" or not lent):
        strategy = "base_add"
    monkeypatch.setattr(backends, "product_strategy", lambda *args: strategy)
    check_base(backend, torch.float32, base, variant)


@pytest.mark.parametrize("base", BASES)
def test_a_backward_pass_finds_the_adapters_of_its_own_forward_pass(
    backend: Backend, base: str
) -> None:
    torch.manual_seed(0)
    dtype = torch.float32
    weights = [leaf(backend, dtype, n, FEATURES).detach() for n in OUTS]
    adapters = [adapters_of(backend, dtype, n, "lora") for n in OUTS]
    others = [adapters_of(backend, dtype, n, "partial") for n in OUTS]
    x, dy = leaf(backend, dtype, ROWS, FEATURES), leaf(backend, dtype, ROWS, sum(OUTS)).detach()
    expected = results(backend, group_over(base, weights, adapters), x, dy, "lora")
    group = group_over(base, weights, adapters)
    leaves = [x, *(t for t in group.tensors() if t is not None)]
    y = torch.cat(ops.lora_linear(x, group, impl=backend.impl), -1)
    group.set_adapters(others)
    ops.lora_linear(x, group, impl=backend.impl)
    for mine, alone in zip(torch.autograd.grad(y, leaves, dy), expected[1:], strict=True):
        assert torch.equal(mine, alone)
