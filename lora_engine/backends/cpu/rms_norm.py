"""RMSNorm.

x and y (dy, h and dx) are [rows, cols], or [tokens, heads, cols] with the heads of a token side by
side, which have one row of rstd each and no residual (dh).
"""

from torch import Tensor

from lora_engine.backends.cpu.launch import dtype_code, kernels, pointer
from lora_engine.backends.cpu.structs import RmsNormArgs, RmsNormBwdArgs


def heads(x: Tensor) -> int:
    """How many rows stand side by side at each of x's strides."""
    return x.shape[1] if x.dim() == 3 else 1


def rms_norm_fwd(
    x: Tensor,  # [rows, cols] or [tokens, heads, cols]
    residual: Tensor | None,  # [rows, cols]
    weight: Tensor,  # [cols]
    y: Tensor,  # as x
    h: Tensor | None,  # [rows, cols], contiguous; given with residual; else a copy
    rstd: Tensor,  # [rows] float32
    eps: float,
    offset: float,
) -> None:
    """Writes y and rstd, and h = x + residual, if given."""
    if h is not None and residual is None:
        h.copy_(x)
        h = None
    kernels().rms_norm_fwd(
        dtype_code(x.dtype),
        RmsNormArgs(
            x=x.data_ptr(),
            residual=pointer(residual),
            weight=weight.data_ptr(),
            y=y.data_ptr(),
            h=pointer(h),
            rstd=rstd.data_ptr(),
            rows=rstd.numel(),
            heads=heads(x),
            cols=x.shape[-1],
            x_stride=x.stride(0),
            residual_stride=0 if residual is None else residual.stride(0),
            y_stride=y.stride(0),
            eps=eps,
            offset=offset,
        ),
    )


def rms_norm_bwd(
    dy: Tensor,  # as h
    dh: Tensor | None,  # [rows, cols]; added to dx
    h: Tensor,  # [rows, cols] or [tokens, heads, cols], what was normed
    weight: Tensor,  # [cols]
    rstd: Tensor,  # [rows] float32
    dx: Tensor,  # as h; may be dy
    dweight: Tensor | None,  # [cols] float32
    offset: float,
) -> None:
    """Writes dx, and dweight if given."""
    kernels().rms_norm_bwd(
        dtype_code(h.dtype),
        RmsNormBwdArgs(
            dy=dy.data_ptr(),
            dh=pointer(dh),
            h=h.data_ptr(),
            weight=weight.data_ptr(),
            rstd=rstd.data_ptr(),
            dx=dx.data_ptr(),
            dweight=pointer(dweight),
            rows=rstd.numel(),
            heads=heads(h),
            cols=h.shape[-1],
            dy_stride=dy.stride(0),
            dh_stride=0 if dh is None else dh.stride(0),
            h_stride=h.stride(0),
            dx_stride=dx.stride(0),
            offset=offset,
        ),
    )
