"""RMSNorm with its gradient."""

from typing import Any

import torch
from torch import Tensor

from lora_engine import backends, reference
from lora_engine.ops import augmented
from lora_engine.ops.tensors import accumulate_dtype, as_rows, check, empty_rows, shape_of


def rms_norm(
    x: Tensor,  # [..., H]
    weight: Tensor,  # [H]
    eps: float,
    *,
    tail: int = 0,
    impl: str | None = None,
) -> Tensor:
    """`x / sqrt(mean(x²) + eps) * weight` over the last dimension (arXiv:1910.07467).

    Arithmetic in float32 with one rounding to x's dtype. A weight that does not require a gradient
    costs none. `tail` leaves that many spare columns behind each row for `ops.lora_linear`.

    Raises ValueError where the shapes or dtypes do not fit.
    """
    check(
        weight.shape == x.shape[-1:],
        f"rms_norm: weight {shape_of(weight)} does not fit x {shape_of(x)}",
    )
    check(
        weight.dtype == x.dtype,
        f"rms_norm: weight {shape_of(weight)} and x {shape_of(x)} differ in dtype",
    )
    impl = backends.select("rms_norm", x.device, x.dtype, impl)
    if impl == "reference":
        return reference.rms_norm(x, weight, eps)
    out: Tensor = _RmsNorm.apply(x, weight, eps, tail, backends.kernels("rms_norm", impl))
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, tail: int, kernels: Any) -> Tensor:
        rows = as_rows(x)
        weight = weight.contiguous()
        count, cols = rows.shape
        (y,) = augmented.empty(count, [cols], tail, dtype=x.dtype, device=x.device)
        rstd = torch.empty(count, dtype=accumulate_dtype(x.dtype), device=x.device)
        kernels.rms_norm_fwd(rows, weight, y, rstd, eps)
        ctx.save_for_backward(rows, weight, rstd)
        ctx.shape, ctx.kernels = x.shape, kernels
        return augmented.keep_room(y, y.view(x.shape))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dy = as_rows(dy)
        count, cols = x.shape
        dx = empty_rows(count, cols, dtype=x.dtype, device=x.device)
        dweight = rstd.new_empty(cols) if ctx.needs_input_grad[1] else None
        ctx.kernels.rms_norm_bwd(dy, x, weight, rstd, dx, dweight)
        return (
            dx.view(ctx.shape),
            None if dweight is None else dweight.to(weight.dtype),
            None,
            None,
            None,
        )
