"""Gated activations."""

from typing import Any

from torch import Tensor

from lora_engine.backends.cpu.address import dtype_code, pointer
from lora_engine.backends.extension import native


def glu_fwd(
    gate: Tensor,  # [rows, cols]
    up: Tensor,  # [rows, cols]
    y: Tensor,  # [rows, cols]
    *,
    activation: str,
) -> None:
    """Writes y."""
    rows, cols = gate.shape
    native().glu_fwd(
        dtype_code(gate.dtype),
        _activation_code(activation),
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
    h: Tensor | None = None,  # [rows, cols]
    *,
    activation: str,
) -> None:
    """Writes dgate and dup, and the forward result into h if given."""
    rows, cols = gate.shape
    native().glu_bwd(
        dtype_code(gate.dtype),
        _activation_code(activation),
        dy.data_ptr(),
        gate.data_ptr(),
        up.data_ptr(),
        dgate.data_ptr(),
        dup.data_ptr(),
        pointer(h),
        rows,
        cols,
        dy.stride(0),
        gate.stride(0),
        up.stride(0),
        dgate.stride(0),
        dup.stride(0),
        0 if h is None else h.stride(0),
    )


def _activation_code(activation: str) -> Any:
    return getattr(native().Activation, activation)
