"""LayerNorm."""

from torch import Tensor

from lora_engine.backends.cpu.launch import dtype_code, kernels, pointer
from lora_engine.backends.cpu.structs import LayerNormArgs, LayerNormBwdArgs


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
    kernels().layer_norm_fwd(
        dtype_code(x.dtype),
        LayerNormArgs(
            x=x.data_ptr(),
            weight=pointer(weight),
            bias=pointer(bias),
            y=y.data_ptr(),
            mean=mean.data_ptr(),
            rstd=rstd.data_ptr(),
            rows=rows,
            cols=cols,
            x_stride=x.stride(0),
            y_stride=y.stride(0),
            eps=eps,
        ),
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
    kernels().layer_norm_bwd(
        dtype_code(x.dtype),
        LayerNormBwdArgs(
            dy=dy.data_ptr(),
            x=x.data_ptr(),
            weight=pointer(weight),
            mean=mean.data_ptr(),
            rstd=rstd.data_ptr(),
            dx=dx.data_ptr(),
            dweight=pointer(dweight),
            dbias=pointer(dbias),
            rows=rows,
            cols=cols,
            dy_stride=dy.stride(0),
            x_stride=x.stride(0),
            dx_stride=dx.stride(0),
        ),
    )
