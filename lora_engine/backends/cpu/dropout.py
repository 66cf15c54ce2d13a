"""Dropout whose mask is a function of a seed."""

from torch import Tensor

from lora_engine.backends.cpu.launch import dtype_code, kernels
from lora_engine.backends.cpu.structs import DropoutArgs
from lora_engine.values import Dropout


def dropout_fwd(
    x: Tensor,  # [rows, cols]
    y: Tensor,  # [rows, cols]; may be x
    dropout: Dropout,
    substream: int,
) -> None:
    """Writes y = mask * x / (1 - p), the mask that of `reference.dropout_mask`."""
    rows, cols = x.shape
    kernels().dropout(
        dtype_code(x.dtype),
        DropoutArgs(
            x=x.data_ptr(),
            y=y.data_ptr(),
            rows=rows,
            cols=cols,
            x_stride=x.stride(0),
            y_stride=y.stride(0),
            p=dropout.p,
            seed=dropout.seed,
            substream=substream,
        ),
    )
