"""Products without gradients, as when a model generates, on every backend."""

import pytest
import torch
from adapted_linears import KINDS, Linears, group_of
from implementations import Backend
from torch import Tensor

from lora_engine import ops
from lora_engine.testing import error
from lora_engine.values import AdaptedLinear, LoraFactors

OPERATION = "lora_linear"
pytestmark = pytest.mark.reference

# Of bfloat16 and float16 S and the scaled B are rounded too, and DoRA's scale.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def by_merged_weights(x: Tensor, linears: list[AdaptedLinear]) -> Tensor:
    """The outputs side by side: x times each W + Σ s B A, which DoRA gives rows of length m."""
    outputs = []
    for linear in linears:
        weight, bias = linear.weight, torch.zeros(linear.weight.shape[0]).to(linear.weight)
        for factors in linear.adapters:
            weight = weight + factors.scaling * factors.lora_b @ factors.lora_a
            if factors.magnitude is not None:
                weight = torch.nn.functional.normalize(weight) * factors.magnitude[:, None]
            if factors.bias is not None:
                bias = bias + factors.scaling * factors.bias
        outputs.append(x @ weight.t() + (bias if linear.bias is None else bias + linear.bias))
    return torch.cat(outputs, -1)


def result(backend: Backend, x: Tensor, group: ops.LoraGroup) -> Tensor:
    with torch.no_grad():
        y = torch.cat(ops.lora_linear(x, group, impl=backend.impl), -1)
    assert not y.requires_grad
    return y


@pytest.mark.parametrize("rows", [1, 40])  # a product of few rows, and one that is not
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter(backend: Backend, dtype: torch.dtype, kind: str, rows: int) -> None:
    torch.manual_seed(0)
    linears = Linears.make(backend, (24, 8), 20, dtype, kind)
    (x,) = backend.put(torch.randn(rows, 1, 20).to(dtype))
    for leaf in linears.leaves:
        leaf.requires_grad_()
    y = result(backend, x, group_of(linears.take(iter(linears.leaves), dtype)))
    with torch.no_grad():
        wide = linears.take((leaf.double() for leaf in linears.leaves), torch.float64)
        assert error(y, by_merged_weights(x.double(), wide)) < TOLERANCES[dtype]


def test_strided_inputs(backend: Backend) -> None:
    torch.manual_seed(0)
    linears = Linears.make(backend, (24,), 20, torch.float32, "lora")
    taken = linears.take(iter(linears.leaves), torch.float32)
    (wide,) = backend.put(torch.randn(8, 3, 40))
    for x in (wide[:5, :, 20:], wide[:, 1, ::2], wide[:2, :, :20].transpose(0, 1)):
        assert error(result(backend, x, group_of(taken)), by_merged_weights(x, taken)) < 1e-5


def test_written_factors_are_seen_at_once(backend: Backend) -> None:
    torch.manual_seed(0)
    linears = Linears.make(backend, (24,), 20, torch.float32, "lora")
    taken = linears.take(iter(linears.leaves), torch.float32)
    group, (x,) = group_of(taken), backend.put(torch.randn(1, 20))
    before = result(backend, x, group)
    taken[0].adapters[0].lora_b.mul_(2)
    after = result(backend, x, group)
    assert error(after, by_merged_weights(x, taken)) < 1e-5
    assert not torch.equal(after, before)


def test_an_adapter_that_is_routed_to(backend: Backend) -> None:
    """Each row by itself, with the adapter that it names: the first, the second, none."""
    torch.manual_seed(0)
    linears = Linears.make(backend, (24, 8), 20, torch.float32, "several")
    taken = linears.take(iter(linears.leaves), torch.float32)
    x, routes = backend.put(torch.randn(3, 20), torch.tensor([0, 1, -1]))
    with torch.no_grad():
        y = torch.cat(ops.lora_linear(x, group_of(taken), routes=routes, impl=backend.impl), -1)
    for row, route in enumerate((0, 1, -1)):
        own = [AdaptedLinear(one.weight, of(one.adapters, route), one.bias) for one in taken]
        assert error(y[row], by_merged_weights(x[row], own)) < 1e-5


def of(adapters: list[LoraFactors], number: int) -> list[LoraFactors]:
    return [factors for factors in adapters if factors.adapter == number]
