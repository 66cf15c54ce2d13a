"""Dropout whose mask is a function of a seed."""

from torch import Tensor

from lora_engine.backends.cpu.address import dtype_code
from lora_engine.backends.extension import native
from lora_engine.values import Dropout


def dropout_fwd(
    x: Tensor,  # [rows, cols]
    y: Tensor,  # [rows, cols]; may be x
    dropout: Dropout,
    stream: int,
) -> None:
    """Writes y = mask * x / (1 - p), the mask that of `reference.dropout_mask`."""
    rows, cols = x.shape
    native().dropout(
        dtype_code(x.dtype),
        x.data_ptr(),
        y.data_ptr(),
        rows,
        cols,
        x.stride(0),
        y.stride(0),
        dropout.p,
        dropout.seed,
        stream,
    )
