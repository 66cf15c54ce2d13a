"""RMSNorm."""

from torch import Tensor

from lora_engine import backends
from lora_engine.cpu.address import dtype_code, pointer


def rms_norm_fwd(
    x: Tensor,  # [rows, cols]
    residual: Tensor | None,  # [rows, cols]
    weight: Tensor,  # [cols]
    y: Tensor,  # [rows, cols]
    h: Tensor | None,  # [rows, cols], contiguous; given with residual
    rstd: Tensor,  # [rows] float32
    eps: float,
    offset: float,
) -> None:
    """Writes y and rstd, and h = x + residual if there is a residual."""
    rows, cols = x.shape
    backends.native().rms_norm_fwd(
        dtype_code(x.dtype),
        x.data_ptr(),
        pointer(residual),
        weight.data_ptr(),
        y.data_ptr(),
        pointer(h),
        rstd.data_ptr(),
        rows,
        cols,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        y.stride(0),
        eps,
        offset,
    )


def rms_norm_bwd(
    dy: Tensor,  # [rows, cols]
    dh: Tensor | None,  # [rows, cols]; added to dx
    h: Tensor,  # [rows, cols], what was normed
    weight: Tensor,  # [cols]
    rstd: Tensor,  # [rows] float32
    dx: Tensor,  # [rows, cols]
    dweight: Tensor | None,  # [cols] float32
    offset: float,
) -> None:
    """Writes dx, and dweight if given."""
    rows, cols = h.shape
    backends.native().rms_norm_bwd(
        dtype_code(h.dtype),
        dy.data_ptr(),
        pointer(dh),
        h.data_ptr(),
        weight.data_ptr(),
        rstd.data_ptr(),
        dx.data_ptr(),
        pointer(dweight),
        rows,
        cols,
        dy.stride(0),
        0 if dh is None else dh.stride(0),
        h.stride(0),
        dx.stride(0),
        offset,
    )
