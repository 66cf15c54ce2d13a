"""RMSNorm."""

from torch import Tensor

from lora_engine import backends
from lora_engine.cpu.address import dtype_code, pointer


def rms_norm_fwd(
    x: Tensor,  # [rows, cols]
    weight: Tensor,  # [cols]
    y: Tensor,  # [rows, cols]
    rstd: Tensor,  # [rows] float32
    eps: float,
) -> None:
    """Writes y and rstd."""
    rows, cols = x.shape
    backends.native().rms_norm_fwd(
        dtype_code(x.dtype),
        x.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        rstd.data_ptr(),
        rows,
        cols,
        x.stride(0),
        y.stride(0),
        eps,
    )


def rms_norm_bwd(
    dy: Tensor,  # [rows, cols]
    x: Tensor,  # [rows, cols]
    weight: Tensor,  # [cols]
    rstd: Tensor,  # [rows] float32
    dx: Tensor,  # [rows, cols], contiguous
    dweight: Tensor | None,  # [cols] float32
) -> None:
    """Writes dx, and dweight if given."""
    rows, cols = x.shape
    backends.native().rms_norm_bwd(
        dtype_code(x.dtype),
        dy.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        rstd.data_ptr(),
        dx.data_ptr(),
        pointer(dweight),
        rows,
        cols,
        dy.stride(0),
        x.stride(0),
    )
