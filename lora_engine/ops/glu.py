"""Gated activations with their gradients."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_engine import backends, reference
from lora_engine.backends import contracts, launchers
from lora_engine.ops import augmented
from lora_engine.ops.tensors import as_rows, check, shape_of
from lora_engine.values import ACTIVATIONS


def glu(
    gate: Tensor,  # [..., I]
    up: Tensor,  # [..., I]
    *,
    activation: str = "silu",
    tail: int = 0,
    grad_tail: int = 0,
    overwrite: bool = False,
    impl: str | None = None,
) -> Tensor:
    """`act(gate) * up` (arXiv:2002.05202), in gate's dtype.

    `activation` is "silu" (SwiGLU), "gelu" (g times the normal distribution's Phi(g), with erf;
    arXiv:1606.08415) or "gelu_tanh" (its approximation by tanh, transformers'
    "gelu_pytorch_tanh"; GeGLU as in Gemma). Finite gates of any size give finite results; of
    the infinite ones -inf gives NaN (0 * inf), as in PyTorch, and both have NaN gradients.

    `tail` leaves that many spare columns behind each row of the result for `ops.lora_linear`, and
    `grad_tail` as many behind the two gradients, which lie side by side in one buffer.

    `overwrite` lets the backward pass write the gradients over gate and up, where both are results
    of other operations: nobody may read their values after it. Autograd does not (it raises, as it
    does for anything that it saved and that was modified in place), nor a second backward pass.

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
    check(
        not (overwrite and grad_tail),
        "glu: overwrite=True puts the gradients where there is no room for a grad_tail",
    )
    impl = backends.select("glu", gate.device, gate.dtype, impl)
    if impl == "reference":
        return reference.glu(gate, up, activation=activation)
    overwrite = overwrite and _may_be_overwritten(gate, up)
    call = _Call(activation, tail, grad_tail, overwrite, launchers.glu(impl))
    out: Tensor = _Glu.apply(gate, up, call)
    return out


def swiglu(
    gate: Tensor,  # [..., I]
    up: Tensor,  # [..., I]
    *,
    tail: int = 0,
    grad_tail: int = 0,
    impl: str | None = None,
) -> Tensor:
    """`silu(gate) * up`: `glu` with its default activation."""
    return glu(gate, up, tail=tail, grad_tail=grad_tail, impl=impl)


class _Call(NamedTuple):
    """One call of `glu`, besides its tensors."""

    activation: str
    tail: int
    grad_tail: int
    overwrite: bool
    kernels: contracts.Glu


class _Inputs(NamedTuple):
    """The function's inputs, as their gradients."""

    gate: Any = None
    up: Any = None
    call: Any = None


class _Saved(NamedTuple):
    """What the backward pass reads."""

    gate: Tensor  # [..., I]
    up: Tensor  # [..., I]


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, call: _Call) -> Tensor:
        gate_rows, up_rows = as_rows(gate), as_rows(up)
        count, cols = gate_rows.shape
        (y,) = augmented.empty(count, [cols], call.tail, dtype=gate.dtype, device=gate.device)
        call.kernels.glu_fwd(gate_rows, up_rows, y, activation=call.activation)
        ctx.save_for_backward(*_Saved(gate, up))
        ctx.call = call
        return augmented.result(y, gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> _Inputs:
        call: _Call = ctx.call
        saved = _Saved(*ctx.saved_tensors)
        gate, up = as_rows(saved.gate), as_rows(saved.up)
        count, cols = gate.shape
        if call.overwrite:
            # Bumps the version counters: another function that saved gate or up, or a second
            # backward pass, then raises instead of reading overwritten values.
            torch.autograd.graph.increment_version(saved)
            dgate, dup = gate.detach(), up.detach()
        else:
            dgate, dup = augmented.empty(
                count, [cols, cols], call.grad_tail, dtype=gate.dtype, device=gate.device
            )
        call.kernels.glu_bwd(as_rows(dy), gate, up, dgate, dup, activation=call.activation)
        return _Inputs(gate=augmented.shaped(dgate, dy.shape), up=augmented.shaped(dup, dy.shape))


def _may_be_overwritten(gate: Tensor, up: Tensor) -> bool:
    """Whether both are results that autograd made, in places of their own."""
    if not all(x.requires_grad and not x.is_leaf for x in (gate, up)):
        return False
    if not all(x.stride(-1) == 1 and _is_rows(x) for x in (gate, up)):
        return False
    if gate.untyped_storage().data_ptr() != up.untyped_storage().data_ptr():
        return True
    # Columns of one buffer: apart if they leave each other's columns alone.
    cols, step = gate.shape[-1], _row_stride(gate)
    distance = abs(int(gate.storage_offset()) - int(up.storage_offset())) % step
    return step == _row_stride(up) and cols <= distance <= step - cols


def _row_stride(x: Tensor) -> int:
    return x.stride(-2) if x.dim() > 1 else x.shape[-1]


def _is_rows(x: Tensor) -> bool:
    """Whether x [..., cols] is rows a stride of at least cols apart, so that a view makes them."""
    expected = _row_stride(x)
    if expected < x.shape[-1]:
        return False
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
