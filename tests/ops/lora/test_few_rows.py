"""Products of few rows without gradients: which are taken so, and that they are right."""

import itertools
from dataclasses import replace

import pytest
import torch
from implementations import Backend
from torch import Tensor

from lora_engine import backends, ops, reference
from lora_engine.ops.layer.blocks import Branch
from lora_engine.ops.layer.mlp_block import mlp_block
from lora_engine.ops.lora import few_rows
from lora_engine.ops.lora.linear import adapted_linears
from lora_engine.testing import error
from lora_engine.values import AdaptedLinear, PreNorm

pytestmark = pytest.mark.skipif(
    not backends.extension_available(), reason="the C++ kernels cannot run here"
)

OPERATION = "few_rows"
ROWS = (1, 2, 7, 8, 9, 16, 17, 32)
ON_A_UNIT = (*ROWS, 33, 49, 64)  # of bfloat16
# K and the linears' N: whole vectors, less than one, and some with a part left over.
SIZES = ((64, (48,)), (3, (1,)), (65, (49, 17)), (33, (2, 4, 5)), (128, (96, 1)))
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 4e-3}


def factors(
    n: int, k: int, rank: int, dtype: torch.dtype = torch.float32, number: int = 0
) -> ops.LoraFactors:
    lora_a, lora_b = torch.randn(rank, k) * k**-0.5, torch.randn(n, rank)
    return ops.LoraFactors(lora_a.to(dtype), lora_b.to(dtype), 0.37, adapter=number)


def weight_of(
    k: int,
    outs: tuple[int, ...],
    dtype: torch.dtype,
    adapters: list[ops.LoraFactors | list[ops.LoraFactors] | None],
    *,
    bias: bool = False,
) -> ops.LoraGroup:
    weights = [torch.randn(n, k).to(dtype) for n in outs]
    biases = [torch.randn(n).to(dtype) for n in outs] if bias else None
    return ops.LoraGroup.dense(weights, adapters, biases)


def expected(x: Tensor, weight: ops.LoraGroup) -> Tensor:
    """The formula in float64, from the factors as they are."""
    linears = [
        AdaptedLinear(
            linear.weight.double(),
            [
                replace(
                    f,
                    lora_a=f.lora_a.double(),
                    lora_b=f.lora_b.double(),
                    magnitude=None if f.magnitude is None else f.magnitude.double(),
                    bias=None if f.bias is None else f.bias.double(),
                )
                for f in linear.adapters
            ],
            None if linear.bias is None else linear.bias.double(),
        )
        for linear in adapted_linears(weight)
    ]
    return torch.cat(reference.lora_group(x.double(), linears), -1)


def result(backend: Backend, x: Tensor, weight: ops.LoraGroup) -> Tensor:
    """The outputs side by side, which the backend's kernel for few rows makes."""
    with torch.no_grad():
        assert few_rows.kernels_for(x, weight, impl=backend.impl) is not None
        return torch.cat(ops.lora_linear(x, weight, impl=backend.impl), -1)


def rows_of(backend: Backend, dtype: torch.dtype) -> tuple[int, ...]:
    """Numbers of rows that the backend's kernel takes."""
    takes_more = backends.few_rows_impl(64, backend.device, dtype, backend.impl) is not None
    return ON_A_UNIT if takes_more else ROWS


def test_every_size(backend: Backend, dtype: torch.dtype) -> None:
    for rows, (k, outs) in itertools.product(rows_of(backend, dtype), SIZES):
        torch.manual_seed(rows)
        with backend.device:
            weight = weight_of(k, outs, dtype, [factors(n, k, 5 + n % 3) for n in outs])
            x = torch.randn(rows, k).to(dtype)
        y = result(backend, x, weight)
        assert error(y, expected(x, weight)) < TOLERANCES[dtype], (rows, k, outs)


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_factors_of_any_dtype(
    backend: Backend, dtype: torch.dtype, factor_dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    with backend.device:
        weight = weight_of(40, (24, 8), dtype, [factors(n, 40, 4, factor_dtype) for n in (24, 8)])
        x = torch.randn(8, 40).to(dtype)
    assert error(result(backend, x, weight), expected(x, weight)) < TOLERANCES[dtype]


def test_none_one_and_several_adapters(backend: Backend) -> None:
    torch.manual_seed(0)
    with backend.device:
        several = [factors(8, 40, 3), factors(8, 40, 17, number=1)]
        adapters = [None, several, factors(8, 40, 4)]
        weight = weight_of(40, (24, 8, 8), torch.float32, adapters, bias=True)
        x = torch.randn(2, 3, 40)
    assert error(result(backend, x, weight), expected(x, weight)) < 1e-5


def test_strided_inputs_and_factors(backend: Backend) -> None:
    torch.manual_seed(0)
    with backend.device:
        wide = torch.randn(8, 3, 80)
        lora = ops.LoraFactors(torch.randn(4, 60)[:, :40], torch.randn(24, 9)[:, 2:6], 0.5)
        weight = weight_of(40, (24,), torch.float32, [lora])
    for x in (wide[:5, :, 40:], wide[:, 1, ::2], wide[:2, :, :40].transpose(0, 1)):
        assert error(result(backend, x, weight), expected(x, weight)) < 1e-5


VARIANTS: dict[str, dict[str, bool]] = {
    "plain": {},
    "dora": {"magnitude": True},
    "biased adapters": {"bias": True},
    "biases": {"biases": True},
    "dora and biases": {"magnitude": True, "biases": True},
    "all biases": {"bias": True, "biases": True},
}


@pytest.mark.parametrize("stored", ["dense", "nf4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_and_packed_weights(
    backend: Backend, dtype: torch.dtype, variant: str, stored: str
) -> None:
    """Blocks of rows that are decoded at a time begin and end within linears."""
    if stored == "nf4" and dtype == torch.float64:
        pytest.skip("packed weights are of 32 bits at most")
    torch.manual_seed(0)
    has, outs, k = VARIANTS[variant], (1000, 24, 1050), 64
    with backend.device:
        adapters = [
            replace(
                factors(n, k, 5),
                magnitude=torch.rand(n) + 1 if has.get("magnitude") else None,
                bias=torch.randn(n) if has.get("bias") else None,
            )
            for n in outs
        ]
        weights = [torch.randn(n, k).to(dtype) for n in outs]
        kept = [ops.quantize_weight(w, stored) for w in weights] if stored == "nf4" else weights
        biases = [torch.randn(n).to(dtype) for n in outs] if has.get("biases") else None
        base = ops.base_of(kept, 15)
        weight = ops.LoraGroup(base, adapters, biases)
        x, residual = torch.randn(8, k).to(dtype), torch.randn(8, sum(outs)).to(dtype)
    assert stored == "dense" or len(list(base.blocks())) == 3
    found = result(backend, x, weight)
    assert error(found, expected(x, weight)) < 2 * TOLERANCES[dtype]
    with torch.no_grad():
        kernels = few_rows.kernels_for(x, weight, impl=backend.impl)
        assert kernels is not None
        added = few_rows.lora_linear(kernels, x, weight, residual)
    assert error(added, found.double() + residual) < TOLERANCES[dtype]
    for rows in (1, 5):
        assert torch.equal(result(backend, x[:rows], weight), found[:rows])


def test_a_row_does_not_depend_on_others(backend: Backend, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    with backend.device:
        weight = weight_of(65, (49, 17), dtype, [factors(49, 65, 6), None])
        x = torch.randn(max(rows_of(backend, dtype)), 65).to(dtype)
    whole = result(backend, x, weight)
    for rows in range(1, len(x)):
        assert torch.equal(result(backend, x[:rows], weight), whole[:rows])


@pytest.mark.parametrize("row", [0, 5, 16, 31])
def test_what_is_not_finite_stays_in_its_row(
    backend: Backend, dtype: torch.dtype, row: int
) -> None:
    torch.manual_seed(0)
    with backend.device:
        weight = weight_of(65, (49, 17), dtype, [factors(49, 65, 6), factors(17, 65, 3)])
        x = torch.randn(32, 65).to(dtype)
    clean = result(backend, x, weight)
    x[row, 64] = torch.inf
    found = result(backend, x, weight)
    others = torch.arange(32, device=x.device) != row
    assert torch.equal(found[others], clean[others]) and not found[row].isfinite().any()


def test_what_stands_beside_operands_is_not_read(backend: Backend, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    with backend.device:
        around = torch.full((3, 30), torch.nan, dtype=dtype)
        around[:, :20] = torch.randn(3, 20)
        weight = weight_of(20, (9,), dtype, [factors(9, 20, 3)])
    assert isinstance(weight.base, ops.DenseBase)
    weight.base.buffer[:, 20:] = torch.nan
    weight.base.buffer[9:] = torch.nan
    assert torch.isfinite(result(backend, around[:, :20], weight)).all()


def test_written_factors_are_seen_at_once(backend: Backend) -> None:
    torch.manual_seed(0)
    with backend.device:
        lora = factors(24, 40, 4)
        weight, x = weight_of(40, (24,), torch.float32, [lora]), torch.randn(1, 40)
    before = result(backend, x, weight)
    lora.lora_b.data.mul_(2)
    assert error(result(backend, x, weight), expected(x, weight)) < 1e-5
    assert not torch.equal(result(backend, x, weight), before)


def test_others_are_left_to_the_augmented_product() -> None:
    weight = weight_of(40, (24,), torch.float32, [factors(24, 40, 4)])
    one = torch.randn(1, 40)
    assert few_rows.kernels_for(one, weight) is None  # gradients may be asked for
    with torch.no_grad():
        assert few_rows.kernels_for(torch.randn(32, 40), weight) is not None
        assert few_rows.kernels_for(torch.randn(33, 40), weight) is None
        assert few_rows.kernels_for(torch.randn(0, 40), weight) is None
        assert few_rows.kernels_for(one, weight, impl="reference") is None
        pair = factors(24, 40, 4)
        columns = ops.LoraFactors(torch.randn(40, 4).t(), pair.lora_b, 0.5)
        mixed = ops.LoraFactors(pair.lora_a, pair.lora_b.bfloat16(), 0.5)
        for other in (columns, mixed):
            assert few_rows.kernels_for(one, weight_of(40, (24,), torch.float32, [other])) is None
            y = ops.lora_linear(one, weight_of(40, (24,), torch.float32, [other]))
            assert torch.isfinite(y[0]).all()


def test_factors_given_another_shape_are_refused() -> None:
    lora = factors(24, 40, 4)
    weight = weight_of(40, (24,), torch.float32, [lora])
    lora.lora_a.data = torch.randn(3, 40)
    with torch.no_grad(), pytest.raises(RuntimeError, match="size"):
        ops.lora_linear(torch.randn(1, 40), weight)


def test_dropout_drops() -> None:
    weight = weight_of(40, (24,), torch.float32, [factors(24, 40, 4)])
    x, dropout = torch.randn(2, 40), ops.Dropout(0.5, 7)
    with torch.no_grad():
        kept, dropped = ops.lora_linear(x, weight), ops.lora_linear(x, weight, dropout=dropout)
    assert error(kept[0], dropped[0]) > 1e-2


@pytest.mark.parametrize("rows", [1, 16])
def test_mlp_block(backend: Backend, dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    with backend.device:
        gate_up = weight_of(40, (56, 56), dtype, [factors(56, 40, 4), factors(56, 40, 4)])
        down = weight_of(56, (40,), dtype, [factors(40, 56, 4)])
        norm, branch = PreNorm(torch.rand(40).to(dtype), 1e-5), Branch(gate_up, down)
        x = torch.randn(rows, 1, 40).to(dtype)
    with torch.no_grad():
        ours = mlp_block(x, norm, branch, impl=backend.impl)
        theirs = mlp_block(x, norm, branch, impl="reference")
    assert ours.shape == x.shape
    assert error(ours, theirs) < 2 * TOLERANCES[dtype]


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias: bool) -> None:
    torch.manual_seed(0)
    module = torch.nn.Linear(40, 1000, bias=bias)
    x = torch.randn(3, 5, 40)[:, -1:]
    with torch.no_grad():
        ours = ops.linear_few_rows(x, module.weight, module.bias)
        assert ours is not None and error(ours, module(x)) < 1e-5
        assert ops.linear_few_rows(torch.randn(5, 41), module.weight, module.bias) is None
        assert ops.linear_few_rows(torch.randn(33, 40), module.weight, module.bias) is None
        assert ops.linear_few_rows(x.bfloat16(), module.weight, module.bias) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.linear_few_rows(x, module.weight, module.bias) is None
    assert ops.linear_few_rows(x, module.weight, module.bias) is None


def test_what_follows_torchs_calls_gets_none() -> None:
    """Outside an autograd function a tracer takes what the kernel writes for a constant."""
    module, x = torch.nn.Linear(40, 8).requires_grad_(False), torch.randn(3, 40)
    taken = []

    def product(given: Tensor) -> Tensor:
        found = ops.linear_few_rows(given, module.weight, module.bias)
        taken.append(found is not None)
        return module(given) if found is None else found

    with torch.no_grad():
        traced = torch.jit.trace(product, x, check_trace=False)
        assert torch.equal(traced(2 * x), module(2 * x))
        torch.func.functionalize(product)(x)
        _, change = torch.func.jvp(product, (x,), (x,))
        assert error(change, x @ module.weight.t()) < 1e-5
        assert not any(taken)
        product(x)
    assert taken[-1]


def test_a_bias_that_is_elsewhere_is_not_left_out() -> None:
    module = torch.nn.Linear(40, 8)
    with torch.no_grad():
        found = ops.linear_few_rows(torch.randn(3, 40), module.weight, module.bias.to("meta"))
    assert found is None
