"""Gated activations with their gradients."""

from typing import NamedTuple

import torch
from torch import Tensor

from lora_engine import backends, reference
from lora_engine.backends import contracts, launchers
from lora_engine.ops import augmented
from lora_engine.ops.context import Context
from lora_engine.ops.once_differentiable import once_differentiable
from lora_engine.ops.tensors import as_rows, check, shape_of
from lora_engine.values import ACTIVATIONS


def glu(
    gate: Tensor,  # [..., I]
    up: Tensor,  # [..., I]
    *,
    activation: str = "silu",
    padding_columns: int = 0,
    grad_padding_columns: int = 0,
    impl: str | None = None,
) -> Tensor:
    """`act(gate) * up` (arXiv:2002.05202), in gate's dtype.

    `activation` is "silu" (SwiGLU), "gelu" (g times the normal distribution's Phi(g), with erf;
    arXiv:1606.08415) or "gelu_tanh" (its approximation by tanh, transformers'
    "gelu_pytorch_tanh"; GeGLU as in Gemma). Finite gates of any size give finite results; of
    the infinite ones -inf gives NaN (0 * inf), as in PyTorch, and both have NaN gradients.

    `padding_columns` leaves that many columns behind each row of the result for `ops.lora_linear`,
    and `grad_padding_columns` as many behind the two gradients, which lie side by side in one
    buffer.

    Raises ValueError where the shapes, dtypes or options do not fit.
    """
    check(
        gate.shape == up.shape and gate.dtype == up.dtype and gate.dim() > 0 and gate.shape[-1] > 0,
        lambda: f"glu: gate {shape_of(gate)} and up {shape_of(up)} differ, or have no columns",
    )
    check(
        activation in ACTIVATIONS,
        lambda: f"glu: activation {activation!r}: expected one of {', '.join(ACTIVATIONS)}",
    )
    impl = backends.select("glu", gate.device, gate.dtype, impl)
    if impl == "reference":
        return reference.glu(gate, up, activation=activation)
    call = _Call(
        activation=activation,
        padding_columns=padding_columns,
        grad_padding_columns=grad_padding_columns,
        kernels=launchers.glu(impl),
    )
    out: Tensor = _Glu.apply(gate, up, call)
    return out


class _Call(NamedTuple):
    """One call of `glu`, besides its tensors."""

    activation: str
    padding_columns: int
    grad_padding_columns: int
    kernels: contracts.Glu


class _Gradients(NamedTuple):
    """The gradients of the function's inputs."""

    gate: Tensor
    up: Tensor
    call: None = None


class _Saved(NamedTuple):
    """What the backward pass reads."""

    gate: Tensor  # [..., I]
    up: Tensor  # [..., I]


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context[_Call], gate: Tensor, up: Tensor, call: _Call) -> Tensor:
        gate_rows, up_rows = as_rows(gate), as_rows(up)
        count, cols = gate_rows.shape
        (y,) = augmented.empty(
            count, [cols], call.padding_columns, dtype=gate.dtype, device=gate.device
        )
        call.kernels.glu_fwd(gate_rows, up_rows, y, activation=call.activation)
        ctx.save_for_backward(*_Saved(gate, up))
        ctx.kept = call
        return augmented.result(y, gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context[_Call], dy: Tensor) -> _Gradients:
        call = ctx.kept
        saved = _Saved(*ctx.saved_tensors)
        gate, up = as_rows(saved.gate), as_rows(saved.up)
        count, cols = gate.shape
        dgate, dup = augmented.empty(
            count, [cols, cols], call.grad_padding_columns, dtype=gate.dtype, device=gate.device
        )
        call.kernels.glu_bwd(as_rows(dy), gate, up, dgate, dup, activation=call.activation)
        return _Gradients(augmented.shaped(dgate, dy.shape), augmented.shaped(dup, dy.shape))
