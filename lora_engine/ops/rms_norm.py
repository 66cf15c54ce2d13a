"""RMSNorm with its gradient, alone or with the residual addition before it."""

from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_engine import backends, reference
from lora_engine.backends import contracts, launchers
from lora_engine.ops import augmented
from lora_engine.ops.tensors import accumulate_dtype, as_rows, check, empty_rows, shape_of


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: None = None,
    offset: float = 0.0,
    tail: int = 0,
    grad_tail: int = 0,
    impl: str | None = None,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor,
    offset: float = 0.0,
    tail: int = 0,
    grad_tail: int = 0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,  # [..., H]
    weight: Tensor,  # [H]
    eps: float,
    *,
    residual: Tensor | None = None,  # [..., H]
    offset: float = 0.0,
    tail: int = 0,
    grad_tail: int = 0,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`x / sqrt(mean(x²) + eps) * (weight + offset)` over the last dimension (arXiv:1910.07467).

    Arithmetic in float32 with one rounding to x's dtype; `offset` is 1 for Gemma, whose weights
    are kept as differences from one. A weight that does not require a gradient costs none.

    With `residual`, the pair (normed, h): h = x + residual, rounded to x's dtype, is what is
    normed, and the next residual. Its gradient joins the norm's in the backward pass, which writes
    one tensor, the gradient of x and of the residual.

    `tail` leaves that many spare columns behind each row of the normed result for
    `ops.lora_linear`, and `grad_tail` as many behind the gradient of x, where x is such a linear's
    result.

    Raises ValueError where the shapes or dtypes do not fit.
    """
    check(
        weight.shape == x.shape[-1:],
        lambda: f"rms_norm: weight {shape_of(weight)} does not fit x {shape_of(x)}",
    )
    check(
        weight.dtype == x.dtype,
        lambda: f"rms_norm: weight {shape_of(weight)} and x {shape_of(x)} differ in dtype",
    )
    check(
        residual is None or (residual.shape == x.shape and residual.dtype == x.dtype),
        lambda: (
            f"rms_norm: residual {'' if residual is None else shape_of(residual)} "
            f"and x {shape_of(x)} differ"
        ),
    )
    impl = backends.select("rms_norm", x.device, x.dtype, impl)
    if impl == "reference":
        if residual is None:
            return reference.rms_norm(x, weight, eps, offset=offset)
        return reference.rms_norm(x, weight, eps, residual=residual, offset=offset)
    kernels = launchers.rms_norm(impl)
    out: Tensor | tuple[Tensor, Tensor] = _RmsNorm.apply(
        x, weight, residual, eps, offset, tail, grad_tail, kernels
    )
    return out


class _Inputs(NamedTuple):
    """The function's inputs: which need gradients, or these."""

    x: Any = None
    weight: Any = None
    residual: Any = None
    eps: Any = None
    offset: Any = None
    tail: Any = None
    grad_tail: Any = None
    kernels: Any = None


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        residual: Tensor | None,
        eps: float,
        offset: float,
        tail: int,
        grad_tail: int,
        kernels: contracts.RmsNorm,
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        h = rows = as_rows(x)
        weight = weight.contiguous()
        count, cols = rows.shape
        added = None if residual is None else as_rows(residual)
        if added is not None:
            h = empty_rows(count, cols, dtype=x.dtype, device=x.device)
        (y,) = augmented.empty(count, [cols], tail, dtype=x.dtype, device=x.device)
        rstd = torch.empty(count, dtype=accumulate_dtype(x.dtype), device=x.device)
        kernels.rms_norm_fwd(
            rows, added, weight, y, None if added is None else h, rstd, eps, offset
        )
        ctx.save_for_backward(h, weight, rstd)
        ctx.shape, ctx.offset, ctx.grad_tail, ctx.kernels = x.shape, offset, grad_tail, kernels
        normed = augmented.result(y, x.shape)
        return normed if added is None else (normed, h.view(x.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None = None) -> tuple[Any, ...]:
        h, weight, rstd = ctx.saved_tensors
        if dy is None:  # the normed result was not used
            return _Inputs(x=dh, residual=dh)
        asked = _Inputs(*ctx.needs_input_grad)
        count, cols = h.shape
        (dx,) = augmented.empty(count, [cols], ctx.grad_tail, dtype=h.dtype, device=h.device)
        dweight = rstd.new_empty(cols) if asked.weight else None
        dh_rows = None if dh is None else as_rows(dh)
        kernels: contracts.RmsNorm = ctx.kernels
        kernels.rms_norm_bwd(as_rows(dy), dh_rows, h, weight, rstd, dx, dweight, ctx.offset)
        shaped = augmented.shaped(dx, ctx.shape)
        return _Inputs(
            x=shaped,
            weight=None if dweight is None else dweight.to(weight.dtype),
            residual=shaped if asked.residual else None,
        )
