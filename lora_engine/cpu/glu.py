"""Gated activations."""

from torch import Tensor

from lora_engine import backends
from lora_engine.cpu.address import dtype_code


def glu_fwd(
    gate: Tensor,  # [rows, cols]
    up: Tensor,  # [rows, cols]
    y: Tensor,  # [rows, cols]
) -> None:
    """Writes y."""
    rows, cols = gate.shape
    backends.native().swiglu_fwd(
        dtype_code(gate.dtype),
        gate.data_ptr(),
        up.data_ptr(),
        y.data_ptr(),
        rows,
        cols,
        gate.stride(0),
        up.stride(0),
        y.stride(0),
    )


def glu_bwd(
    dy: Tensor,  # [rows, cols]
    gate: Tensor,  # [rows, cols]
    up: Tensor,  # [rows, cols]
    dgate: Tensor,  # [rows, cols]; may be gate
    dup: Tensor,  # [rows, cols]; may be up
) -> None:
    """Writes dgate and dup."""
    rows, cols = gate.shape
    backends.native().swiglu_bwd(
        dtype_code(gate.dtype),
        dy.data_ptr(),
        gate.data_ptr(),
        up.data_ptr(),
        dgate.data_ptr(),
        dup.data_ptr(),
        rows,
        cols,
        dy.stride(0),
        gate.stride(0),
        up.stride(0),
        dgate.stride(0),
        dup.stride(0),
    )
