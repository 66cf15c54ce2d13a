"""Gated activations with their gradients."""

from typing import Any

import torch
from torch import Tensor

from lora_engine import backends, reference
from lora_engine.ops import augmented
from lora_engine.ops.native import as_rows, check, dtype_code, shape_of


def swiglu(
    gate: Tensor,  # [..., I]
    up: Tensor,  # [..., I]
    *,
    tail: int = 0,
    grad_tail: int = 0,
    impl: str | None = None,
) -> Tensor:
    """`silu(gate) * up` (arXiv:2002.05202), in gate's dtype.

    `tail` leaves that many spare columns behind each row of the result for `ops.lora_linear`, and
    `grad_tail` as many behind the two gradients, which lie side by side in one buffer.

    Raises ValueError where the shapes or dtypes do not fit.
    """
    check(
        gate.shape == up.shape and gate.dtype == up.dtype,
        f"swiglu: gate {shape_of(gate)} and up {shape_of(up)} differ",
    )
    if backends.select("swiglu", gate.device, gate.dtype, impl) == "reference":
        return reference.swiglu(gate, up)
    out: Tensor = _SwiGlu.apply(gate, up, tail, grad_tail)
    return out


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, tail: int, grad_tail: int) -> Tensor:
        gate_rows, up_rows = as_rows(gate), as_rows(up)
        count, cols = gate_rows.shape
        (y,) = augmented.empty(count, [cols], tail, dtype=gate.dtype, device=gate.device)
        backends.native().swiglu_fwd(
            dtype_code(gate.dtype),
            gate_rows.data_ptr(),
            up_rows.data_ptr(),
            y.data_ptr(),
            count,
            cols,
            gate_rows.stride(0),
            up_rows.stride(0),
            y.stride(0),
        )
        ctx.save_for_backward(gate_rows, up_rows)
        ctx.shape, ctx.grad_tail = gate.shape, grad_tail
        return augmented.keep_room(y, y.view(gate.shape))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dy = as_rows(dy)
        count, cols = gate.shape
        dgate, dup = augmented.empty(
            count, [cols, cols], ctx.grad_tail, dtype=gate.dtype, device=gate.device
        )
        backends.native().swiglu_bwd(
            dtype_code(gate.dtype),
            dy.data_ptr(),
            gate.data_ptr(),
            up.data_ptr(),
            dgate.data_ptr(),
            dup.data_ptr(),
            count,
            cols,
            dy.stride(0),
            gate.stride(0),
            up.stride(0),
            dgate.stride(0),
            dup.stride(0),
        )
        return (
            augmented.keep_room(dgate, dgate.view(ctx.shape)),
            augmented.keep_room(dup, dup.view(ctx.shape)),
            None,
            None,
        )
