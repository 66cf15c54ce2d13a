"""Products of large matrices by the CPU kernel, on every instruction set and on modelled tiles."""

from collections.abc import Iterator

import pytest
import tile_model
import torch
from implementations import runnable_isas
from torch import Tensor

from lora_engine import backends
from lora_engine.backends import choice, plans
from lora_engine.backends.cpu.matmul import matmul
from lora_engine.backends.products import multiply
from lora_engine.backends.request import Matmul, Present, Request

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# One element; less and more than blocks, strips and tiles; inner sizes in pieces and panels.
SIZES = [
    (1, 1, 1),
    (3, 5, 7),
    (16, 32, 32),
    (33, 65, 66),
    (47, 31, 95),
    (100, 40, 592),
    (200, 70, 1601),
    (64, 300, 48),
    (33, 33, 17001),
]


@pytest.fixture(params=[*runnable_isas(), tile_model.NAME])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The instruction set whose kernel multiplies."""
    if request.param == tile_model.NAME:
        with tile_model.tiles_modelled(monkeypatch):
            yield request.param
        return
    native = backends.native()
    best = native.isa()
    assert native.select_isa(request.param)
    yield request.param
    assert native.select_isa(best)


def beside_nan(rows: int, cols: int, dtype: torch.dtype, beside: int) -> Tensor:
    """A matrix with NaN between its rows and behind them."""
    wide = torch.full((rows + 1, cols + beside), float("nan"), dtype=dtype)
    wide[:rows, :cols] = torch.randn(rows, cols, dtype=torch.float64)
    return wide[:rows, :cols]


def agrees(found: Tensor, wanted: Tensor, inner: int) -> bool:
    """Within the rounding of float32 sums of `inner` terms of size one, and of the result."""
    places = {torch.float32: 24, torch.bfloat16: 9, torch.float64: 53}[found.dtype]
    sums = 2.0 ** -(53 if found.dtype == torch.float64 else 24)
    allowed = wanted.abs() * 2.0 ** (1 - places) + 8 * sums * inner
    return bool(((found.double() - wanted).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("m,n,k", SIZES)
def test_against_float64(kernel: str, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    if kernel == tile_model.NAME and dtype != torch.bfloat16:
        pytest.skip("tiles multiply bfloat16 alone")
    a, by_rows = beside_nan(m, k, dtype, 3), beside_nan(k, n, dtype, 1)
    transposed = beside_nan(n, k, dtype, 5)
    transposed.copy_(by_rows.t())
    exact = a.clone().double() @ by_rows.clone().double()
    for b in by_rows, transposed.t():
        out = beside_nan(m, n, dtype, 2)
        for added in None, torch.randn(n, dtype=dtype), beside_nan(m, n, dtype, 4), out:
            wanted = exact if added is None else exact + added.clone().double()
            matmul(a, b, out, added)
            assert agrees(out, wanted, k)


def test_what_stands_beside_the_result_stays(kernel: str) -> None:
    wide = torch.full((40, 90), 7.0, dtype=torch.bfloat16)
    matmul(torch.randn(33, 64).bfloat16(), torch.randn(64, 50).bfloat16(), wide[3:36, 20:70])
    wide[3:36, 20:70] = 7
    assert torch.equal(wide, torch.full_like(wide, 7))


def test_nothing_to_sum_or_to_write(kernel: str) -> None:
    out = torch.full((5, 6), float("nan"))
    matmul(torch.empty(5, 0), torch.empty(0, 6), out)
    assert torch.equal(out, torch.zeros(5, 6))
    matmul(torch.empty(0, 4), torch.randn(4, 6), torch.empty(0, 6))
    matmul(torch.randn(5, 4), torch.empty(4, 0), torch.empty(5, 0))


def test_number_of_threads_changes_no_bit(kernel: str) -> None:
    a, b = torch.randn(300, 700).bfloat16(), torch.randn(330, 700).bfloat16().t()
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 5, 16):
            torch.set_num_threads(number)
            found.append(torch.empty(300, 330, dtype=torch.bfloat16))
            matmul(a, b, found[-1])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_infinity_and_nan_reach_their_row_alone(kernel: str) -> None:
    a, b = torch.randn(40, 80).bfloat16(), torch.randn(80, 70).bfloat16()
    a[7, 79], a[20, 0] = float("nan"), float("inf")
    out = torch.empty(40, 70, dtype=torch.bfloat16)
    matmul(a, b, out)
    finite = out.isfinite().all(1)
    assert [i for i in range(40) if not finite[i]] == [7, 20]
    assert bool(out[7].isnan().all()) and bool(out[20].isinf().all())


def strategy(isa: str, dtype: torch.dtype, device: str = "cpu") -> str:
    there = Present(isa, None, False, False, (), False, False)
    request = Request("lora_linear", device, None, dtype, Matmul())
    plan = choice.choose(request, there).plan
    assert isinstance(plan, plans.Strategy)
    return plan.name


def test_our_kernel_multiplies_where_there_is_a_matrix_unit() -> None:
    assert strategy("amx_bf16", torch.bfloat16) == "tiles"
    assert strategy("amx_bf16", torch.float32) == "vendor"
    assert strategy("avx512_bf16", torch.bfloat16) == "vendor"
    assert strategy("amx_bf16", torch.bfloat16, "cuda") == "vendor"


def test_operands_that_our_kernel_cannot_read_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(8, 6).bfloat16(), torch.randn(6, 9).bfloat16()
    columns = torch.randn(6, 8).bfloat16().t()  # rows of a that are not adjacent
    with tile_model.tiles_modelled(monkeypatch):
        for left, right in ((columns, b), (a, b), (a, b[:, ::3])):
            out = torch.empty(8, right.shape[1], dtype=torch.bfloat16)
            assert torch.equal(multiply(out, left, right), out)
            assert torch.allclose(out.float(), left.float() @ right.float(), atol=0.05, rtol=0.01)
        with pytest.raises(RuntimeError, match="dtype"):
            multiply(torch.empty(8, 9), a, b)
