"""The products of a LoRA group against float64, each implementation by its own functions."""

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
from lora_engine.backends import contracts, launchers
from lora_engine.reference.dropout import drop, dropout_mask
from lora_engine.values import Dropout

OPERATION = "lora_linear"
SMALL_TILES = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_R": 16, "GROUP_M": 2}


def kernels_of(backend: Backend) -> contracts.LoraLinear:
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
    s = wide_nan(group.rows, group.total, dtype, backend)
    kernels_of(backend).lora_a_fwd(inputs.x, inputs.lora_a, s, group.spans, dropout)
    assert untouched(s)
    outside = torch.ones(group.total, dtype=torch.bool)
    for i, (_, columns) in enumerate(group.spans):
        outside[columns] = False
        agree(
            s[:, columns],
            lambda x, a, i=i: masked(x, dropout, i) @ a.T,
            [inputs.x, inputs.lora_a[columns]],
        )
    assert (s[:, outside] == 0).all()


@pytest.mark.parametrize("with_db", [True, False], ids=["", "ds_alone"])
@by_group
def test_lora_b_bwd(
    backend: Backend,
    dtype: torch.dtype,
    poisoned: None,
    small_tiles: None,
    group: Group,
    with_db: bool,
) -> None:
    inputs = make(group, backend, dtype)
    ds = wide_nan(group.rows, group.total, dtype, backend)
    n = sum(group.outs)
    d_lora_b = wide_nan(n, group.total, factor_dtype(dtype), backend) if with_db else None
    kernels_of(backend).lora_b_bwd(inputs.dy, inputs.lora_b, inputs.s, ds, d_lora_b, group.spans)
    assert untouched(ds)
    outside = torch.ones(group.total, dtype=torch.bool)
    for rows, columns in group.spans:
        outside[columns] = False
        dy = inputs.dy[:, rows]
        agree(ds[:, columns], lambda dy, b: dy @ b, [dy, inputs.lora_b[rows, columns]], "ds")
        if d_lora_b is not None:
            d_b = d_lora_b[rows, columns]
            agree(d_b, lambda dy, s: dy.T @ s, [dy, inputs.s[:, columns]], "d_lora_b")
    assert (ds[:, outside] == 0).all()
    assert d_lora_b is None or untouched(d_lora_b)


@by_dropout
@by_group
def test_lora_a_bwd(
    backend: Backend,
    dtype: torch.dtype,
    poisoned: None,
    small_tiles: None,
    group: Group,
    dropout: Dropout | None,
) -> None:
    inputs = make(group, backend, dtype)
    d_lora_a = wide_nan(group.total, group.cols, factor_dtype(dtype), backend)
    kernels_of(backend).lora_a_bwd(inputs.ds, inputs.x, d_lora_a, group.spans, dropout)
    assert untouched(d_lora_a)
    outside = torch.ones(group.total, dtype=torch.bool)
    for i, (_, columns) in enumerate(group.spans):
        outside[columns] = False
        agree(
            d_lora_a[columns],
            lambda ds, x, i=i: ds.T @ masked(x, dropout, i),
            [inputs.ds[:, columns], inputs.x],
        )
    assert (d_lora_a[outside] == 0).all()


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
        d_b = torch.zeros(128, 24, device=backend.device)
        kernels.lora_a_fwd(inputs.x, inputs.lora_a, s, group.spans, dropout)
        kernels.lora_b_bwd(inputs.dy, inputs.lora_b, s, ds, d_b, group.spans)
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
        for shape in ((50, 12), (50, 12), (50, 72), (50, 48), (12, 48), (72, 12))
    )
    kernels.lora_a_fwd(inputs.x, inputs.lora_a, s, group.spans, dropout)
    kernels.lora_linear_fwd(inputs.x, inputs.weight, s, inputs.lora_b, y)
    kernels.lora_b_bwd(inputs.dy, inputs.lora_b, s, ds, d_b, group.spans)
    kernels.lora_a_bwd(ds, inputs.x, d_a, group.spans, dropout)
    kernels.lora_linear_dx(inputs.dy, inputs.weight, ds, inputs.lora_a, dx, group.spans, dropout)
    assert x.grad is not None and a.grad is not None and b.grad is not None
    pairs = [(y, expected), (dx, x.grad), (d_a, a.grad)]
    pairs += [(d_b[rows, cols], b.grad[rows, cols]) for rows, cols in group.spans]
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
