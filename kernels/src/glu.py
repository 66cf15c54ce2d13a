"""Gated activations, one program for a block of columns of one row."""

import triton
import triton.language as tl
from lora_engine.kernels import launch
from torch import Tensor


@triton.jit
def _glu_fwd_kernel(
    gate_ptr,  # [rows, cols]
    up_ptr,  # [rows, cols]
    y_ptr,  # [rows, cols]
    cols,
    stride_gate,
    stride_up,
    stride_y,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < cols
    gate = tl.load(gate_ptr + row * stride_gate + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + offs, mask=mask, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * stride_y + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _glu_bwd_kernel(
    dy_ptr,  # [rows, cols]
    gate_ptr,  # [rows, cols]
    up_ptr,  # [rows, cols]
    dgate_ptr,  # [rows, cols]
    dup_ptr,  # [rows, cols]
    cols,
    stride_dy,
    stride_gate,
    stride_up,
    stride_dgate,
    stride_dup,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < cols
    dy = tl.load(dy_ptr + row * stride_dy + offs, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + offs, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    dup = dy * gate * sigmoid
    tl.store(dgate_ptr + row * stride_dgate + offs, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + row * stride_dup + offs, dup.to(dup_ptr.dtype.element_ty), mask=mask)


def glu_fwd(
    gate: Tensor,  # [rows, cols]
    up: Tensor,  # [rows, cols]
    y: Tensor,  # [rows, cols]
) -> None:
    """Writes y. Launch size: cols."""
    rows, cols = gate.shape
    config = launch.config("glu_fwd", gate.device, gate.dtype, cols)
    _glu_fwd_kernel[_grid(rows, cols, config)](
        gate, up, y, cols, gate.stride(0), up.stride(0), y.stride(0), **config
    )


def glu_bwd(
    dy: Tensor,  # [rows, cols]
    gate: Tensor,  # [rows, cols]
    up: Tensor,  # [rows, cols]
    dgate: Tensor,  # [rows, cols]; may be gate
    dup: Tensor,  # [rows, cols]; may be up
) -> None:
    """Writes dgate and dup. Launch size: cols."""
    rows, cols = gate.shape
    config = launch.config("glu_bwd", gate.device, gate.dtype, cols)
    _glu_bwd_kernel[_grid(rows, cols, config)](
        dy,
        gate,
        up,
        dgate,
        dup,
        cols,
        dy.stride(0),
        gate.stride(0),
        up.stride(0),
        dgate.stride(0),
        dup.stride(0),
        **config,
    )


def _grid(rows: int, cols: int, config: dict[str, int]) -> tuple[int, int]:
    return rows, triton.cdiv(cols, config["BLOCK_N"])
