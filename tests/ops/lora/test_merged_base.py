"""Products with a weight that is merged with its adapter and quantised: Q(W + s B A).

The formula is written out here in float64, with autograd through W + s B A and Q passed by.
"""

from collections.abc import Sequence

import pytest
import torch
from implementations import Backend
from oracle import TOLERANCE
from torch import Tensor

from lora_engine import ops
from lora_engine.ops import LoraFactors, LoraGroup, quantize_weight
from lora_engine.ops.lora.merged_base import MergedBase
from lora_engine.ops.mergeable_weight import MergeableWeight
from lora_engine.quantization.formats import WRITABLE, writable_format
from lora_engine.testing import error

OPERATION = "lora_linear"
FEATURES, OUTS, SCALING = 128, (128, 64), 0.5


def format_of(name: str = "nf4"):  # type: ignore[no-untyped-def]
    return writable_format(name, None, False)


def weights_of(dtype: torch.dtype, device: object = "cpu") -> list[Tensor]:
    torch.manual_seed(3)
    return [(torch.randn(n, FEATURES) * FEATURES**-0.5).to(device, dtype) for n in OUTS]  # type: ignore[call-overload]


def factors_of(
    device: object = "cpu", dtype: torch.dtype = torch.float32, rank: int = 4
) -> list[LoraFactors]:
    torch.manual_seed(4)

    def leaf(*shape: int) -> Tensor:
        values = torch.randn(shape, dtype=torch.float64) * shape[-1] ** -0.5
        return values.to(device, dtype).requires_grad_()  # type: ignore[call-overload]

    return [LoraFactors(leaf(rank, FEATURES), leaf(n, rank), SCALING) for n in OUTS]


def merging_group(
    weights: Sequence[Tensor],
    factors: Sequence[LoraFactors | None],
    format: str = "nf4",
    biases: Sequence[Tensor] | None = None,
) -> LoraGroup:
    kept = [MergeableWeight(weight, format_of(format), weight.dtype) for weight in weights]
    return LoraGroup(ops.base_of(kept, 0), factors, biases, capacity=8)


def merged_weight(weight: Tensor, factors: LoraFactors | None, format: str = "nf4") -> Tensor:
    """The weight that is served: the sum in float32 or more, rounded, in packed bits, decoded."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(wide)
    if factors is not None:
        total = total + factors.scaling * (factors.lora_b.to(wide) @ factors.lora_a.to(wide))
    return quantize_weight(total.detach().to(weight.dtype), format).dequantize()


def straight_through(
    x: Tensor, weights: Sequence[Tensor], factors: Sequence[LoraFactors], dy: Tensor, format: str
) -> list[Tensor]:
    """Y, dX, dA and dB of the formula in float64."""
    x = x.detach().double().requires_grad_()
    parts, leaves = [], [x]
    for weight, f in zip(weights, factors, strict=True):
        a, b = (t.detach().double().requires_grad_() for t in (f.lora_a, f.lora_b))
        exact = weight.double() + SCALING * b @ a
        passed = exact + (merged_weight(weight, f, format).double() - exact).detach()
        parts.append(x @ passed.t())
        leaves += [a, b]
    y = torch.cat(parts, -1)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]


def ours(
    x: Tensor, group: LoraGroup, factors: Sequence[LoraFactors], dy: Tensor, impl: str | None
) -> list[Tensor]:
    y = torch.cat(ops.lora_linear(x, group, impl=impl), -1)
    leaves = [x, *(t for f in factors for t in (f.lora_a, f.lora_b))]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("rows", [3, 70, 700])
def test_the_served_weight_is_multiplied_and_gradients_pass_the_quantiser(
    backend: Backend, dtype: torch.dtype, rows: int
) -> None:
    device = backend.device
    wide = torch.promote_types(dtype, torch.float32)  # PEFT keeps adapters in float32
    weights, factors = weights_of(dtype, device), factors_of(device, wide)
    x = torch.randn(rows, FEATURES).to(device, dtype).requires_grad_()
    dy = torch.randn(rows, sum(OUTS)).to(device, dtype)
    results = ours(x, merging_group(weights, factors), factors, dy, backend.impl)
    expected = straight_through(x, weights, factors, dy, "nf4")
    names = ("y", "dx", "da", "db", "da of the second", "db of the second")
    for name, mine, exact in zip(names, results, expected, strict=True):
        assert error(mine, exact) < 5 * TOLERANCE[dtype], name


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("format", WRITABLE)
def test_every_format_that_can_be_written(format: str, impl: str | None) -> None:
    weights, factors = weights_of(torch.float32), factors_of()
    x = torch.randn(40, FEATURES, requires_grad=True)
    dy = torch.randn(40, sum(OUTS))
    results = ours(x, merging_group(weights, factors, format), factors, dy, impl)
    for mine, exact in zip(results, straight_through(x, weights, factors, dy, format), strict=True):
        assert error(mine, exact) < 1e-5


def test_a_value_written_in_place_is_seen_and_a_backward_pass_keeps_its_own() -> None:
    weights, factors = weights_of(torch.float32), factors_of()
    group = merging_group(weights, factors)
    x, dy = torch.randn(20, FEATURES, requires_grad=True), torch.randn(20, sum(OUTS))
    before = straight_through(x, weights, factors, dy, "nf4")
    y = torch.cat(ops.lora_linear(x, group), -1)
    with torch.no_grad():  # as an evaluation between the passes: without the adapter, and with one
        group.set_adapters([None] * len(OUTS))
        (first, _) = ops.lora_linear(x, group)
        assert error(first, x @ merged_weight(weights[0], None).t()) < 1e-5
        group.set_adapters(factors)
    assert error(torch.autograd.grad(y, x, dy)[0], before[1]) < 1e-5
    for f in factors:
        f.lora_b.data.mul_(3.0)  # past autograd's counter of versions
    after = straight_through(x, weights, factors, dy, "nf4")
    assert error(before[0], after[0]) > 0.05
    for mine, exact in zip(ours(x, group, factors, dy, None), after, strict=True):
        assert error(mine, exact) < 1e-5
    weights[0].mul_(-1.0)
    assert error(ours(x, group, factors, dy, None)[0], after[0]) > 0.5


def test_a_linear_without_an_adapter_stays_packed_and_biases_are_added() -> None:
    weights, factors = weights_of(torch.float32), factors_of()
    kept = [MergeableWeight(weights[0], format_of(), torch.float32), quantize_weight(weights[1])]
    biases = [torch.randn(n, requires_grad=True) for n in OUTS]
    group = LoraGroup(ops.base_of(kept, 0), [factors[0], None], biases, capacity=8)
    x = torch.randn(50, FEATURES)
    with torch.no_grad():
        few = torch.cat(ops.lora_linear(x[:2], group), -1)
    y = torch.cat(ops.lora_linear(x, group), -1)
    expected = torch.cat(
        [
            x @ merged_weight(weights[0], factors[0]).t() + biases[0],
            x @ merged_weight(weights[1], None).t() + biases[1],
        ],
        -1,
    )
    assert error(y, expected) < 1e-5 and error(few, expected[:2]) < 1e-5
    (grad,) = torch.autograd.grad(y.sum(), biases[1])
    assert torch.equal(grad, torch.full_like(grad, 50))


def test_the_weight_is_made_once_until_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    sum_of = MergeableWeight._sum
    monkeypatch.setattr(MergeableWeight, "_sum", lambda s, f: (made.append(1), sum_of(s, f))[1])
    factors = factors_of()
    group = merging_group(weights_of(torch.float32), factors)
    x = torch.randn(20, FEATURES)
    for _ in range(3):
        ops.lora_linear(x, group)[0].sum().backward()
    assert len(made) == len(OUTS)
    factors[0].lora_a.data.add_(1e-3)
    ops.lora_linear(x, group)
    assert len(made) == len(OUTS) + 1


def test_what_cannot_be_merged_is_refused() -> None:
    weights, (factors, _) = weights_of(torch.float32), factors_of()
    x = torch.randn(20, FEATURES)
    dora = LoraFactors(factors.lora_a, factors.lora_b, 0.5, torch.ones(OUTS[0]))
    by_tensor = LoraFactors(factors.lora_a, factors.lora_b, torch.tensor(0.5))  # type: ignore[arg-type]
    for adapters, reason in (
        ([factors, factors], "one adapter at a time"),
        (dora, "without magnitudes"),
        (by_tensor, "scaling that is a tensor"),
    ):
        with pytest.raises(ValueError, match=reason):
            ops.lora_linear(x, merging_group(weights, [adapters, None]))  # type: ignore[list-item]
    with torch.no_grad():
        factors.lora_b.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        ops.lora_linear(x, merging_group(weights, [factors, None]))


def test_weights_that_are_not_of_one_format_are_no_group() -> None:
    weights = weights_of(torch.float32)
    one, other = (
        MergeableWeight(weight, format_of(name), torch.float32)
        for weight, name in zip(weights, ("nf4", "int8"), strict=True)
    )
    assert not MergedBase.takes([one, other])
    assert not ops.has_base([one, weights[1]])
