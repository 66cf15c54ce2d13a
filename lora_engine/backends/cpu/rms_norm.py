"""RMSNorm.

x and y (dy, h and dx) are [rows, cols], or [tokens, heads, cols] with the heads of a token side by
side, which have one row of rstd each and no residual (dh).
"""

from torch import Tensor

from lora_engine.backends.cpu.address import dtype_code, pointer
from lora_engine.backends.extension import native


def heads(x: Tensor) -> int:
    """How many rows stand side by side at each of x's strides."""
    return x.shape[1] if x.dim() == 3 else 1


def rms_norm_fwd(
    x: Tensor,  # [rows, cols] or [tokens, heads, cols]
    residual: Tensor | None,  # [rows, cols]
    weight: Tensor,  # [cols]
    y: Tensor,  # as x
    h: Tensor | None,  # [rows, cols], contiguous; given with residual
    rstd: Tensor,  # [rows] float32
    eps: float,
    offset: float,
) -> None:
    """Writes y and rstd, and h = x + residual if there is a residual."""
    cols = x.shape[-1]
    native().rms_norm_fwd(
        dtype_code(x.dtype),
        x.data_ptr(),
        pointer(residual),
        weight.data_ptr(),
        y.data_ptr(),
        pointer(h),
        rstd.data_ptr(),
        rstd.numel(),
        heads(x),
        cols,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        y.stride(0),
        eps,
        offset,
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
    cols = h.shape[-1]
    native().rms_norm_bwd(
        dtype_code(h.dtype),
        dy.data_ptr(),
        pointer(dh),
        h.data_ptr(),
        weight.data_ptr(),
        rstd.data_ptr(),
        dx.data_ptr(),
        pointer(dweight),
        rstd.numel(),
        heads(h),
        cols,
        dy.stride(0),
        0 if dh is None else dh.stride(0),
        h.stride(0),
        dx.stride(0),
        offset,
    )
