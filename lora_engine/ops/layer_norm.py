"""LayerNorm with its gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

from lora_engine import backends, reference
from lora_engine.backends import contracts, launchers
from lora_engine.ops import augmented
from lora_engine.ops.context import Context
from lora_engine.ops.once_differentiable import once_differentiable
from lora_engine.ops.tensors import accumulate_dtype, as_rows, check, empty_rows, shape_of


def layer_norm(
    x: Tensor,  # [..., H]
    weight: Tensor | None,  # [H]
    bias: Tensor | None,  # [H]
    eps: float,
    *,
    padding_columns: int = 0,
    impl: str | None = None,
) -> Tensor:
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` over the last dimension.

    arXiv:1607.06450; the variance divides by H, no weight is a weight of ones, no bias one of
    zeros. Arithmetic in float32 with one rounding to x's dtype. A weight or bias that does not
    require a gradient costs none. `padding_columns` leaves that many columns behind each row of the
    result for `ops.lora_linear`.

    Raises ValueError where the shapes or dtypes do not fit.
    """
    _check_parameter("weight", weight, x)
    _check_parameter("bias", bias, x)
    impl = backends.select("layer_norm", x.device, x.dtype, impl)
    if impl == "reference":
        return reference.layer_norm(x, weight, bias, eps)
    call = _Call(eps=eps, padding_columns=padding_columns, kernels=launchers.layer_norm(impl))
    out: Tensor = _LayerNorm.apply(x, weight, bias, call)
    return out


def _check_parameter(name: str, parameter: Tensor | None, x: Tensor) -> None:
    if parameter is None:
        return
    check(
        parameter.shape == x.shape[-1:],
        lambda: f"layer_norm: {name} {shape_of(parameter)} does not fit x {shape_of(x)}",
    )
    check(
        parameter.dtype == x.dtype,
        lambda: f"layer_norm: {name} {shape_of(parameter)} and x {shape_of(x)} differ in dtype",
    )


class _Call(NamedTuple):
    """One call of `layer_norm`, besides its tensors."""

    eps: float
    padding_columns: int
    kernels: contracts.LayerNorm


class _Needs(NamedTuple):
    """Which of the function's inputs need a gradient."""

    x: bool
    weight: bool
    bias: bool
    call: bool


class _Gradients(NamedTuple):
    """The gradients of the function's inputs."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    call: None = None


class _Kept(NamedTuple):
    call: _Call
    shape: torch.Size  # of x


class _Saved(NamedTuple):
    """What the backward pass reads."""

    x: Tensor  # [rows, H]
    weight: Tensor | None  # [H]
    mean: Tensor  # [rows]
    rstd: Tensor  # [rows]


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context[_Kept],
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        call: _Call,
    ) -> Tensor:
        rows = as_rows(x)
        weight = None if weight is None else weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        count, cols = rows.shape
        (y,) = augmented.empty(count, [cols], call.padding_columns, dtype=x.dtype, device=x.device)
        mean, rstd = (
            torch.empty(count, dtype=accumulate_dtype(x.dtype), device=x.device) for _ in range(2)
        )
        call.kernels.layer_norm_fwd(rows, weight, bias, y, mean, rstd, call.eps)
        ctx.save_for_backward(*_Saved(x=rows, weight=weight, mean=mean, rstd=rstd))
        ctx.kept = _Kept(call, x.shape)
        return augmented.result(y, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context[_Kept], dy: Tensor) -> _Gradients:
        call, shape = ctx.kept
        x, weight, mean, rstd = _Saved(*ctx.saved_tensors)
        count, cols = x.shape
        dx = empty_rows(count, cols, dtype=x.dtype, device=x.device)
        needs = _Needs(*ctx.needs_input_grad)
        dweight = rstd.new_empty(cols) if needs.weight else None
        dbias = rstd.new_empty(cols) if needs.bias else None
        call.kernels.layer_norm_bwd(as_rows(dy), x, weight, mean, rstd, dx, dweight, dbias)
        return _Gradients(
            x=dx.view(shape),
            weight=None if dweight is None else dweight.to(x.dtype),
            bias=None if dbias is None else dbias.to(x.dtype),
        )
