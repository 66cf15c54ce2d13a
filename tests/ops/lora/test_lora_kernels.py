"""The products of a LoRA group against float64, each implementation by its own functions."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from implementations import Backend
from lora_groups import (
    DROPOUTS,
    GROUPS,
    Group,
    agree,
    beside_of_wide,
    make,
    masked,
    untouched,
    view,
    wide_nan,
)
from torch import Tensor

from lora_engine import backends
from lora_engine.backends import launchers, lora_contracts
from lora_engine.backends.lora_parts import (
    AdapterPart,
    Added,
    Placing,
    ScaledColumns,
    ScaledRows,
    split_parts,
)
from lora_engine.reference.dropout import drop, dropout_mask
from lora_engine.values import Dropout, LoraFactors

OPERATION = "lora_linear"
PARTS = ("one_scale", "scales", "two_adapters", "ds_alone")
SMALL_TILES = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_R": 16, "GROUP_M": 2}


def kernels_of(backend: Backend) -> lora_contracts.LoraLinear:
    return launchers.lora_linear(backend.impl)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that small inputs fill several of."""
    from lora_engine.backends.triton import launch

    whole = launch.config

    def config(kernel: str, device: torch.device, dtype: torch.dtype, size: int) -> dict[str, Any]:
        found = whole(kernel, device, dtype, size)
        return {name: min(value, SMALL_TILES.get(name, value)) for name, value in found.items()}

    monkeypatch.setattr(launch, "config", config)


def by_group(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("group", GROUPS, ids=str)(test)


def by_dropout(test: Callable[..., None]) -> Callable[..., None]:
    ids = [f"p{dropout.p if dropout else 0}" for dropout in DROPOUTS]
    return pytest.mark.parametrize("dropout", DROPOUTS, ids=ids)(test)


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@by_dropout
@by_group
def test_lora_a_fwd(
    backend: Backend,
    dtype: torch.dtype,
    poisoned: None,
    small_tiles: None,
    group: Group,
    dropout: Dropout | None,
) -> None:
    inputs = make(group, backend, dtype)
    s, copy = (wide_nan(group.rows, group.total, dtype, backend) for _ in range(2))
    kernels_of(backend).lora_a_fwd(inputs.x, inputs.lora_a, s, group.spans, dropout, copy)
    assert untouched(s) and untouched(copy) and torch.equal(s, copy)
    outside = torch.ones(group.total, dtype=torch.bool)
    for i, (_, columns) in enumerate(group.spans):
        outside[columns] = False
        agree(
            s[:, columns],
            lambda x, a, i=i: masked(x, dropout, i) @ a.T,
            [inputs.x, inputs.lora_a[columns]],
        )
    assert (s[:, outside] == 0).all()


def one_scale(group: Group) -> list[AdapterPart]:
    return [part._replace(scale=2.5) for part in group.parts]


def two_adapters_of_a_linear(group: Group) -> list[AdapterPart]:
    found = []
    for rows, columns, scale in group.parts:
        middle = (columns.start + columns.stop) // 2
        found.append(AdapterPart(rows, slice(columns.start, middle), scale))
        found.append(AdapterPart(rows, slice(middle, columns.stop), scale))
    return found


@pytest.mark.parametrize(
    "parts_of", [one_scale, lambda group: group.parts, two_adapters_of_a_linear, None], ids=PARTS
)
@by_group
def test_lora_b_bwd(
    backend: Backend,
    dtype: torch.dtype,
    poisoned: None,
    small_tiles: None,
    group: Group,
    parts_of: Callable[[Group], list[AdapterPart]] | None,
) -> None:
    inputs = make(group, backend, dtype)
    with_db, parts = parts_of is not None, (parts_of or one_scale)(group)
    ds = wide_nan(group.rows, group.total, dtype, backend)
    d_lora_b, d_bs = None, [None] * len(parts)
    if with_db:
        d_lora_b = torch.full((group.size_of_b,), math.nan, dtype=factor_dtype(dtype))
        (d_lora_b,) = backend.put(d_lora_b)
        d_bs = split_parts(d_lora_b, parts)
    operands = inputs.dy, inputs.lora_b, inputs.s
    (factors,) = backend.put(torch.rand(group.rows, dtype=factor_dtype(dtype)))
    scaled = ScaledRows(factors, wide_nan(group.rows, group.total, dtype, backend))
    kernels_of(backend).lora_b_bwd(*operands, ds, d_lora_b, group.spans, parts, scaled)
    assert untouched(ds) and untouched(scaled.ds)
    assert torch.equal(scaled.ds, (ds * factors[:, None]).to(dtype))
    outside = torch.ones(group.total, dtype=torch.bool)
    for (rows, columns, scale), d_b in zip(parts, d_bs, strict=True):
        outside[columns] = False
        dy = inputs.dy[:, rows]
        agree(ds[:, columns], lambda dy, b: dy @ b, [dy, inputs.lora_b[rows, columns]], "ds")
        if d_b is not None:
            s = inputs.s[:, columns]
            agree(d_b, lambda dy, s, scale=scale: dy.T @ s * scale, [dy, s], "d_lora_b")
    assert (ds[:, outside] == 0).all()


@pytest.mark.parametrize("with_scaled", [True, False], ids=["scaled", ""])
@by_dropout
@by_group
def test_lora_a_bwd(
    backend: Backend,
    dtype: torch.dtype,
    poisoned: None,
    small_tiles: None,
    group: Group,
    dropout: Dropout | None,
    with_scaled: bool,
) -> None:
    inputs = make(group, backend, dtype)
    d_lora_a = wide_nan(group.total, group.cols, factor_dtype(dtype), backend)
    weight = inputs.weight[0]
    scaled = ScaledColumns(weight, 1.0) if with_scaled else None
    kernels_of(backend).lora_a_bwd(inputs.ds, inputs.x, d_lora_a, group.spans, dropout, scaled)
    assert untouched(d_lora_a)
    outside = torch.ones(group.total, dtype=torch.bool)
    for i, (_, columns) in enumerate(group.spans):
        outside[columns] = False
        agree(
            d_lora_a[columns],
            lambda ds, x, w, i=i: ds.T @ masked(x, dropout, i) * (w + 1 if with_scaled else 1),
            [inputs.ds[:, columns], inputs.x, weight],
        )
    assert (d_lora_a[outside] == 0).all()


@pytest.mark.parametrize("with_scaled", [True, False], ids=["scaled", ""])
@pytest.mark.parametrize("group", [GROUPS[0], *GROUPS[3:]], ids=str)
def test_gradients_are_added_with_the_bits_of_a_sum_of_tensors(
    backend: Backend, dtype: torch.dtype, small_tiles: None, group: Group, with_scaled: bool
) -> None:
    """Two adapters to a linear, each with totals; the second needs none of A, the third of B."""
    inputs, parts = make(group, backend, dtype), two_adapters_of_a_linear(group)
    kernels, to = kernels_of(backend), factor_dtype(dtype)
    ds, again = (wide_nan(group.rows, group.total, dtype, backend) for _ in range(2))
    columns_scaled = ScaledColumns(inputs.weight[0], 1.0) if with_scaled else None
    (d_a, d_b) = backend.put(
        torch.empty(group.total, group.cols, dtype=to), torch.empty(group.size_of_b, dtype=to)
    )
    kernels.lora_b_bwd(inputs.dy, inputs.lora_b, inputs.s, ds, d_b, group.spans, parts)
    kernels.lora_a_bwd(inputs.ds, inputs.x, d_a, group.spans, None, columns_scaled)

    added, expected = [], []
    for number, (part, of_b) in enumerate(zip(parts, split_parts(d_b, parts), strict=True)):
        of_a = d_a[part.columns]
        a, b = backend.put(*(torch.randn(made.shape, dtype=to) for made in (of_a, of_b)))
        expected += [(a, a + of_a, number != 1), (b, b + of_b, number != 2)]
        added.append(Added(part, a if number != 1 else None, b if number != 2 else None))
    before = [total.clone() for total, _, _ in expected]
    operands = inputs.dy, inputs.lora_b, inputs.s
    kernels.lora_b_bwd(*operands, again, None, group.spans, parts, None, added)
    kernels.lora_a_bwd(inputs.ds, inputs.x, None, group.spans, None, columns_scaled, added)
    assert torch.equal(ds, again) and untouched(again)
    for (total, wanted, is_added), old in zip(expected, before, strict=True):
        assert torch.equal(total, wanted if is_added else old)


PLACED = (torch.float32, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("scales", [(0.1,) * 6, (0.5, 4, 0.1, 0.5, 0.1, 8.0)], ids=["one", "many"])
@pytest.mark.parametrize("factors_dtype", PLACED, ids=str)
def test_factors_are_placed_as_torch_would(
    backend: Backend,
    dtype: torch.dtype,
    scales: tuple[float, ...],
    factors_dtype: torch.dtype,
) -> None:
    """Six adapters: more than one launch takes; B is a transpose, one adapter has no rank."""
    if factors_dtype == torch.bfloat16 != dtype:  # torch rounds products to bfloat16 there
        scales = tuple(0.25 if scale == 0.1 else scale for scale in scales)
    k, sizes = 70, [(130, 8), (33, 3), (65, 0), (40, 5), (1, 1), (24, 16)]
    n, r = sum(out for out, _ in sizes), sum(rank for _, rank in sizes)
    lora_a, lora_b = (wide_nan(*shape, dtype, backend) for shape in ((r, k), (n, r)))
    expected = [lora_a.clone(), lora_b.clone()]
    placings, row, column = [], 0, 0
    for (out, rank), scale in zip(sizes, scales, strict=True):
        tensors = torch.randn(rank, k), torch.randn(rank, out).t()
        a, b = backend.put(*(tensor.to(factors_dtype) for tensor in tensors))
        at = slice(row, row + out), slice(column, column + rank)
        placings.append(Placing(LoraFactors(a, b, scale), lora_a[at[1]], lora_b[at]))
        expected[0][at[1]].copy_(a)
        torch.mul(b, scale, out=expected[1][at])
        row, column = row + out, column + rank
    kernels_of(backend).place_factors(lora_a, lora_b, placings)
    assert untouched(lora_a) and untouched(lora_b)
    for placed, exact in zip((lora_a, lora_b), expected, strict=True):
        assert torch.equal(placed.nan_to_num(9e9), exact.nan_to_num(9e9))


def force_tma(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_engine.backends.triton import launch

    before = launch.config
    monkeypatch.setattr(launch, "config", lambda *a: {**before(*a), "TMA": 1})


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", ""])
@by_group
def test_lora_linear_fwd(
    backend: Backend,
    dtype: torch.dtype,
    poisoned: None,
    small_tiles: None,
    group: Group,
    with_bias: bool,
) -> None:
    inputs = make(group, backend, dtype, beside=beside_of_wide(backend))
    y = wide_nan(group.rows, sum(group.outs), dtype, backend)
    bias = inputs.bias if with_bias else None
    kernels_of(backend).lora_linear_fwd(inputs.x, inputs.weight, inputs.s, inputs.lora_b, y, bias)
    assert untouched(y)

    def formula(x: Tensor, w: Tensor, s: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, w, bias if with_bias else None) + s @ b.T

    agree(y, formula, [inputs.x, inputs.weight, inputs.s, inputs.lora_b, inputs.bias])


def dx_formula(group: Group, dropout: Dropout | None) -> Callable[..., Tensor]:
    def formula(dy: Tensor, weight: Tensor, ds: Tensor, lora_a: Tensor) -> Tensor:
        dx = dy @ weight
        for i, (_, columns) in enumerate(group.spans):
            if columns.stop > columns.start:
                dx = dx + masked(ds[:, columns].contiguous() @ lora_a[columns], dropout, i)
        return dx

    return formula


@by_dropout
@by_group
def test_lora_linear_dx(
    backend: Backend,
    dtype: torch.dtype,
    poisoned: None,
    small_tiles: None,
    group: Group,
    dropout: Dropout | None,
) -> None:
    inputs = make(group, backend, dtype, beside=beside_of_wide(backend))
    dx = wide_nan(group.rows, group.cols, dtype, backend)
    operands = [inputs.dy, inputs.weight, inputs.ds, inputs.lora_a]
    kernels_of(backend).lora_linear_dx(*operands, dx, group.spans, dropout)
    assert untouched(dx)
    agree(dx, dx_formula(group, dropout), operands)


@by_dropout
def test_descriptors_give_the_same(
    backend: Backend,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    poisoned: None,
    small_tiles: None,
    dropout: Dropout | None,
) -> None:
    """Rows 16-byte aligned, sizes no multiple of the tiles, neighbours in the buffers NaN."""
    if backend.impl != "triton":
        pytest.skip("tensor descriptors are Triton's")
    if backend.device.type == "cuda" and backends.capability(backend.device) < 90:
        pytest.skip("needs capability 9.0")
    group = Group(70, 96, (80, 24), (5, 3))
    inputs = make(group, backend, dtype, spare=8)
    operands = [inputs.dy, inputs.weight, inputs.ds, inputs.lora_a]
    force_tma(monkeypatch)
    from lora_engine.backends.triton import lora_linear

    made: list[Any] = []
    descriptor = lora_linear.TensorDescriptor
    monkeypatch.setattr(
        lora_linear, "TensorDescriptor", lambda *a: made.append(a) or descriptor(*a)
    )
    dx = view(torch.full((70, 96), float("nan"), dtype=dtype), 8).to(backend.device)
    lora_linear.lora_linear_dx(*operands, dx, group.spans, dropout)
    assert len(made) == 3
    agree(dx, dx_formula(group, dropout), operands)
    y = torch.full((70, 104), float("nan"), dtype=dtype, device=backend.device)
    operands = [inputs.x, inputs.weight, inputs.s, inputs.lora_b]
    lora_linear.lora_linear_fwd(*operands, y)
    assert len(made) == 6
    agree(y, lambda x, w, s, b: x @ w.T + s @ b.T, operands)


@by_dropout
def test_two_runs_are_bitwise_equal(
    backend: Backend, small_tiles: None, dropout: Dropout | None
) -> None:
    group = Group(150, 96, (96, 32), (16, 8))
    inputs = make(group, backend, torch.float32, beside=beside_of_wide(backend))
    kernels = kernels_of(backend)

    def run() -> list[Tensor]:
        s, ds = (wide_nan(150, 24, torch.float32, backend) for _ in range(2))
        d_a = wide_nan(24, 96, torch.float32, backend)
        d_b = torch.full((group.size_of_b,), math.nan, device=backend.device)
        kernels.lora_a_fwd(inputs.x, inputs.lora_a, s, group.spans, dropout)
        kernels.lora_b_bwd(inputs.dy, inputs.lora_b, s, ds, d_b, group.spans, group.parts)
        kernels.lora_a_bwd(ds, inputs.x, d_a, group.spans, dropout)
        return [s, ds, d_a, d_b]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_gradients_are_those_of_autograd(backend: Backend, small_tiles: None) -> None:
    """The five products put together, with dropout, against autograd through the reference."""
    group, dropout = Group(50, 48, (32, 40), (4, 8)), Dropout(0.3, 21)
    inputs = make(group, backend, torch.float32, beside=beside_of_wide(backend))
    x, a, b = (t.double().cpu().requires_grad_() for t in (inputs.x, inputs.lora_a, inputs.lora_b))
    parts = [
        x @ inputs.weight[rows].double().cpu().T
        + drop(x, dropout, i) @ a[columns].T @ b[rows, columns].T
        for i, (rows, columns) in enumerate(group.spans)
    ]
    expected = torch.cat(parts, 1)
    expected.backward(inputs.dy.double().cpu())
    kernels = kernels_of(backend)
    s, ds, y, dx, d_a, d_b = (
        torch.full(shape, float("nan"), device=backend.device)
        for shape in ((50, 12), (50, 12), (50, 72), (50, 48), (12, 48), (group.size_of_b,))
    )
    kernels.lora_a_fwd(inputs.x, inputs.lora_a, s, group.spans, dropout)
    kernels.lora_linear_fwd(inputs.x, inputs.weight, s, inputs.lora_b, y)
    parts = [part._replace(scale=1.0) for part in group.parts]
    kernels.lora_b_bwd(inputs.dy, inputs.lora_b, s, ds, d_b, group.spans, parts)
    kernels.lora_a_bwd(ds, inputs.x, d_a, group.spans, dropout)
    kernels.lora_linear_dx(inputs.dy, inputs.weight, ds, inputs.lora_a, dx, group.spans, dropout)
    assert x.grad is not None and a.grad is not None and b.grad is not None
    pairs = [(y, expected), (dx, x.grad), (d_a, a.grad)]
    d_bs = zip(group.spans, split_parts(d_b, parts), strict=True)
    pairs += [(part, b.grad[rows, cols]) for (rows, cols), part in d_bs]
    for ours, exact in pairs:
        torch.testing.assert_close(ours.cpu().double(), exact.detach(), rtol=1e-5, atol=1e-6)


def test_no_adapters(backend: Backend, small_tiles: None) -> None:
    """A group without any rank: S, dS and dA are zero, dX and Y the base products."""
    group = Group(20, 32, (16,), (0,), gap=8)
    inputs = make(group, backend, torch.float32, beside=beside_of_wide(backend))
    kernels = kernels_of(backend)
    out = [wide_nan(20, 8, torch.float32, backend) for _ in range(2)]
    d_a = wide_nan(8, 32, torch.float32, backend)
    kernels.lora_a_fwd(inputs.x, inputs.lora_a, out[0], group.spans)
    kernels.lora_b_bwd(inputs.dy, inputs.lora_b, inputs.s, out[1], None, group.spans)
    kernels.lora_a_bwd(inputs.ds, inputs.x, d_a, group.spans)
    assert all((x == 0).all() for x in (*out, d_a))
    dx = wide_nan(20, 32, torch.float32, backend)
    kernels.lora_linear_dx(
        inputs.dy, inputs.weight, inputs.ds, inputs.lora_a, dx, group.spans, Dropout(0.5, 1)
    )
    agree(dx, lambda dy, w: dy @ w, [inputs.dy, inputs.weight])


def test_the_mask_reaches_every_product(backend: Backend, small_tiles: None) -> None:
    """Where everything is dropped, nothing is left of a product: not by chance of the data."""
    group, dropout = Group(9, 20, (6,), (2,)), Dropout(0.5, 4)
    inputs = make(group, backend, torch.float32)
    inputs.x.fill_(float("nan"))
    mask = dropout_mask(dropout, 0, 9, 20).to(backend.device)
    inputs.x[~mask] = 1e30
    inputs.x[mask] = 1.0
    s = wide_nan(9, 2, torch.float32, backend)
    kernels_of(backend).lora_a_fwd(inputs.x, inputs.lora_a, s, group.spans, dropout)
    agree(s, lambda x, a: drop(x, dropout) @ a.T, [inputs.x, inputs.lora_a])
    assert s.abs().max() < 1e3


def test_a_launch_leaves_the_table_as_it_was(backend: Backend) -> None:
    """One launch narrows its own blocks and does without descriptors, not those of the next."""
    from lora_engine.backends.triton import launch

    names = ("lora_linear_fwd", "lora_linear_dx", "lora_a_fwd", "lora_b_bwd", "lora_a_bwd")
    asked = [(name, backend.device, torch.float32, 20) for name in names]
    before = [dict(launch.config(*each)) for each in asked]
    group = Group(20, 32, (16,), (2,))
    inputs = make(group, backend, torch.float32, spare=4, beside=beside_of_wide(backend))
    y, dx = (torch.empty(20, width, device=backend.device) for width in (16, 32))
    kernels = kernels_of(backend)
    kernels.lora_linear_fwd(inputs.x, inputs.weight, inputs.s, inputs.lora_b, y)
    kernels.lora_linear_dx(inputs.dy, inputs.weight, inputs.ds, inputs.lora_a, dx, group.spans)
    assert [launch.config(*each) for each in asked] == before
