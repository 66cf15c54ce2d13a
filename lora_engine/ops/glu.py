"""Gated activations with their gradients."""

from typing import Any

import torch
from torch import Tensor

from lora_engine import backends, reference
from lora_engine.ops import augmented
from lora_engine.ops.tensors import as_rows, check, shape_of


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
    impl = backends.select("glu", gate.device, gate.dtype, impl)
    if impl == "reference":
        return reference.swiglu(gate, up)
    out: Tensor = _Glu.apply(gate, up, tail, grad_tail, backends.kernels("glu", impl))
    return out


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, tail: int, grad_tail: int, kernels: Any
    ) -> Tensor:
        gate_rows, up_rows = as_rows(gate), as_rows(up)
        count, cols = gate_rows.shape
        (y,) = augmented.empty(count, [cols], tail, dtype=gate.dtype, device=gate.device)
        kernels.glu_fwd(gate_rows, up_rows, y)
        ctx.save_for_backward(gate_rows, up_rows)
        ctx.shape, ctx.grad_tail, ctx.kernels = gate.shape, grad_tail, kernels
        return augmented.keep_room(y, y.view(gate.shape))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dy = as_rows(dy)
        count, cols = gate.shape
        dgate, dup = augmented.empty(
            count, [cols, cols], ctx.grad_tail, dtype=gate.dtype, device=gate.device
        )
        ctx.kernels.glu_bwd(dy, gate, up, dgate, dup)
        return (
            augmented.keep_room(dgate, dgate.view(ctx.shape)),
            augmented.keep_room(dup, dup.view(ctx.shape)),
            None,
            None,
            None,
        )
