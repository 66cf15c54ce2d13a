"""LayerNorm."""

from torch import Tensor

from lora_engine.backends.cpu.address import dtype_code, pointer
from lora_engine.backends.extension import native


def layer_norm_fwd(
    x: Tensor,  # [rows, cols]
    weight: Tensor | None,  # [cols]
    bias: Tensor | None,  # [cols]
    y: Tensor,  # [rows, cols]
    mean: Tensor,  # [rows] float32
    rstd: Tensor,  # [rows] float32
    eps: float,
) -> None:
    """Writes y, mean and rstd."""
    rows, cols = x.shape
    native().layer_norm_fwd(
        dtype_code(x.dtype),
        x.data_ptr(),
        pointer(weight),
        pointer(bias),
        y.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        rows,
        cols,
        x.stride(0),
        y.stride(0),
        eps,
    )


def layer_norm_bwd(
    dy: Tensor,  # [rows, cols]
    x: Tensor,  # [rows, cols]
    weight: Tensor | None,  # [cols]
    mean: Tensor,  # [rows] float32
    rstd: Tensor,  # [rows] float32
    dx: Tensor,  # [rows, cols]
    dweight: Tensor | None,  # [cols] float32
    dbias: Tensor | None,  # [cols] float32
) -> None:
    """Writes dx, and dweight and dbias if given."""
    rows, cols = x.shape
    native().layer_norm_bwd(
        dtype_code(x.dtype),
        dy.data_ptr(),
        x.data_ptr(),
        pointer(weight),
        mean.data_ptr(),
        rstd.data_ptr(),
        dx.data_ptr(),
        pointer(dweight),
        pointer(dbias),
        rows,
        cols,
        dy.stride(0),
        x.stride(0),
        dx.stride(0),
    )
