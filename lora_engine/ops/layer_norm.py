"""LayerNorm with its gradient."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_engine import backends, reference
from lora_engine.backends import contracts, launchers
from lora_engine.ops import augmented
from lora_engine.ops.tensors import accumulate_dtype, as_rows, check, shape_of


def layer_norm(
    x: Tensor,  # [..., H]
    weight: Tensor | None,  # [H]
    bias: Tensor | None,  # [H]
    eps: float,
    *,
    tail: int = 0,
    grad_tail: int = 0,
    impl: str | None = None,
) -> Tensor:
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` over the last dimension.

    arXiv:1607.06450; the variance divides by H, no weight is a weight of ones, no bias one of
    zeros. Arithmetic in float32 with one rounding to x's dtype. A weight or bias that does not
    require a gradient costs none. `tail` leaves that many spare columns behind each row of the
    result for `ops.lora_linear`, and `grad_tail` as many behind the gradient of x.

    Raises ValueError where the shapes or dtypes do not fit.
    """
    _check_parameter("weight", weight, x)
    _check_parameter("bias", bias, x)
    impl = backends.select("layer_norm", x.device, x.dtype, impl)
    if impl == "reference":
        return reference.layer_norm(x, weight, bias, eps)
    kernels = launchers.layer_norm(impl)
    out: Tensor = _LayerNorm.apply(x, weight, bias, eps, tail, grad_tail, kernels)
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


class _Inputs(NamedTuple):
    """The function's inputs: which need gradients, or these."""

    x: Any = None
    weight: Any = None
    bias: Any = None
    eps: Any = None
    tail: Any = None
    grad_tail: Any = None
    kernels: Any = None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        tail: int,
        grad_tail: int,
        kernels: contracts.LayerNorm,
    ) -> Tensor:
        rows = as_rows(x)
        weight = None if weight is None else weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        count, cols = rows.shape
        (y,) = augmented.empty(count, [cols], tail, dtype=x.dtype, device=x.device)
        mean, rstd = (
            torch.empty(count, dtype=accumulate_dtype(x.dtype), device=x.device) for _ in range(2)
        )
        kernels.layer_norm_fwd(rows, weight, bias, y, mean, rstd, eps)
        ctx.save_for_backward(rows, weight, mean, rstd)
        ctx.shape, ctx.grad_tail, ctx.kernels = x.shape, grad_tail, kernels
        return augmented.result(y, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        count, cols = x.shape
        (dx,) = augmented.empty(count, [cols], ctx.grad_tail, dtype=x.dtype, device=x.device)
        asked = _Inputs(*ctx.needs_input_grad)
        dweight = rstd.new_empty(cols) if asked.weight else None
        dbias = rstd.new_empty(cols) if asked.bias else None
        kernels: contracts.LayerNorm = ctx.kernels
        kernels.layer_norm_bwd(as_rows(dy), x, weight, mean, rstd, dx, dweight, dbias)
        return _Inputs(
            x=augmented.shaped(dx, ctx.shape),
            weight=None if dweight is None else dweight.to(x.dtype),
            bias=None if dbias is None else dbias.to(x.dtype),
        )
