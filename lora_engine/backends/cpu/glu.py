"""Gated activations."""

from torch import Tensor

from lora_engine.backends.cpu.launch import activation_code, dtype_code, kernels, pointer
from lora_engine.backends.cpu.structs import GluArgs, GluBwdArgs


def glu_fwd(
    gate: Tensor,  # [rows, cols]
    up: Tensor,  # [rows, cols]
    y: Tensor,  # [rows, cols]
    *,
    activation: str,
) -> None:
    """Writes y."""
    rows, cols = gate.shape
    kernels().glu_fwd(
        dtype_code(gate.dtype),
        GluArgs(
            gate=gate.data_ptr(),
            up=up.data_ptr(),
            y=y.data_ptr(),
            rows=rows,
            cols=cols,
            gate_stride=gate.stride(0),
            up_stride=up.stride(0),
            y_stride=y.stride(0),
            activation=activation_code(activation),
        ),
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
    kernels().glu_bwd(
        dtype_code(gate.dtype),
        GluBwdArgs(
            dy=dy.data_ptr(),
            gate=gate.data_ptr(),
            up=up.data_ptr(),
            dgate=dgate.data_ptr(),
            dup=dup.data_ptr(),
            h=pointer(h),
            rows=rows,
            cols=cols,
            dy_stride=dy.stride(0),
            gate_stride=gate.stride(0),
            up_stride=up.stride(0),
            dgate_stride=dgate.stride(0),
            dup_stride=dup.stride(0),
            h_stride=0 if h is None else h.stride(0),
            activation=activation_code(activation),
        ),
    )
