"""RMSNorm with its gradient, alone or with the residual addition before it."""

from typing import NamedTuple, overload

import torch
from torch import Tensor

from lora_engine import backends, reference
from lora_engine.backends import contracts, launchers
from lora_engine.ops import augmented
from lora_engine.ops.context import Context
from lora_engine.ops.once_differentiable import once_differentiable
from lora_engine.ops.tensors import accumulate_dtype, as_rows, check, empty_rows, shape_of


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: None = None,
    offset: float = 0.0,
    padding_columns: int = 0,
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
    padding_columns: int = 0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,  # [..., H]
    weight: Tensor,  # [H]
    eps: float,
    *,
    residual: Tensor | None = None,  # [..., H]
    offset: float = 0.0,
    padding_columns: int = 0,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`x / sqrt(mean(x²) + eps) * (weight + offset)` over the last dimension (arXiv:1910.07467).

    Arithmetic in float32 with one rounding to x's dtype; `offset` is 1 for Gemma, whose weights
    are kept as differences from one. A weight that does not require a gradient costs none.

    With `residual`, the pair (normed, h): h = x + residual, rounded to x's dtype, is what is
    normed, and the next residual. Its gradient joins the norm's in the backward pass, which writes
    one tensor, the gradient of x and of the residual.

    `padding_columns` leaves that many columns behind each row of the normed result for
    `ops.lora_linear`.

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
    call = _Call(
        eps=eps, offset=offset, padding_columns=padding_columns, kernels=launchers.rms_norm(impl)
    )
    out: Tensor | tuple[Tensor, Tensor] = _RmsNorm.apply(x, weight, residual, call)
    return out


class _Call(NamedTuple):
    """One call of `rms_norm`, besides its tensors."""

    eps: float
    offset: float
    padding_columns: int
    kernels: contracts.RmsNorm


class _Needs(NamedTuple):
    """Which of the function's inputs need a gradient."""

    x: bool
    weight: bool
    residual: bool
    call: bool


class _Gradients(NamedTuple):
    """The gradients of the function's inputs."""

    x: Tensor | None = None
    weight: Tensor | None = None
    residual: Tensor | None = None
    call: None = None


class _Kept(NamedTuple):
    call: _Call
    shape: torch.Size  # of x


class _Saved(NamedTuple):
    """What the backward pass reads."""

    h: Tensor  # [rows, H], what was normed
    weight: Tensor  # [H]
    rstd: Tensor  # [rows]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context[_Kept],
        x: Tensor,
        weight: Tensor,
        residual: Tensor | None,
        call: _Call,
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        h = rows = as_rows(x)
        weight = weight.contiguous()
        count, cols = rows.shape
        added = None if residual is None else as_rows(residual)
        if added is not None:
            h = empty_rows(count, cols, dtype=x.dtype, device=x.device)
        (y,) = augmented.empty(count, [cols], call.padding_columns, dtype=x.dtype, device=x.device)
        rstd = torch.empty(count, dtype=accumulate_dtype(x.dtype), device=x.device)
        call.kernels.rms_norm_fwd(
            rows, added, weight, y, None if added is None else h, rstd, call.eps, call.offset
        )
        ctx.save_for_backward(*_Saved(h=h, weight=weight, rstd=rstd))
        ctx.kept = _Kept(call, x.shape)
        normed = augmented.result(y, x.shape)
        return normed if added is None else (normed, h.view(x.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Context[_Kept], dy: Tensor | None, dh: Tensor | None = None) -> _Gradients:
        if dy is None:  # the normed result was not used
            return _Gradients(x=dh, residual=dh)
        call, shape = ctx.kept
        h, weight, rstd = _Saved(*ctx.saved_tensors)
        needs = _Needs(*ctx.needs_input_grad)
        count, cols = h.shape
        dx = empty_rows(count, cols, dtype=h.dtype, device=h.device)
        dweight = rstd.new_empty(cols) if needs.weight else None
        dh_rows = None if dh is None else as_rows(dh)
        call.kernels.rms_norm_bwd(as_rows(dy), dh_rows, h, weight, rstd, dx, dweight, call.offset)
        shaped = dx.view(shape)
        return _Gradients(
            x=shaped,
            weight=None if dweight is None else dweight.to(weight.dtype),
            residual=shaped if needs.residual else None,
        )
