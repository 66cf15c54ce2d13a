"""The MLP half of a decoder layer as one autograd function; see ops/layer/blocks.py."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_engine import backends, reference
from lora_engine.backends import launchers
from lora_engine.backends.lora_contracts import FewRows
from lora_engine.ops import augmented
from lora_engine.ops.context import Context, named_first
from lora_engine.ops.layer.blocks import Branch, Call, check_branch, implementation, products
from lora_engine.ops.layer.gated import activate, activate_backward
from lora_engine.ops.lora import few_rows
from lora_engine.ops.lora.linear import adapted_linears
from lora_engine.ops.once_differentiable import once_differentiable
from lora_engine.ops.tensors import (
    accumulate_dtype,
    as_rows,
    check,
    empty_rows,
    without_autocast,
)
from lora_engine.values import PreNorm


@without_autocast
def mlp_block(
    x: Tensor,  # [..., H]
    norm: PreNorm,
    branch: Branch,
    *,
    activation: str = "silu",
    impl: str | None = None,
) -> Tensor:
    """`x + down(act(gate) * up)` for `gate, up = gate_up(norm(x))`, in x's dtype.

    `branch.inner` is the group (gate, up) and `branch.outer` the down projection, as for
    `ops.lora_linear`; gradients as there, and the norm's weight's.

    Raises ValueError where shapes or dtypes do not fit.
    """
    inner_group, outer_group = branch.inner, branch.outer
    check(
        len(inner_group.out_features) == 2
        and set(inner_group.out_features) == {outer_group.in_features},
        lambda: (
            f"mlp_block: gate and up {inner_group.out_features} do not fit down's "
            f"{outer_group.in_features} inputs"
        ),
    )
    check_branch(x, norm, branch)
    if implementation("mlp_block", x, branch, impl) == "reference":
        (down,) = adapted_linears(outer_group)
        return reference.mlp_block(
            augmented.operand(x),
            norm,
            adapted_linears(inner_group),
            down,
            activation=activation,
            dropouts=branch.dropouts,
            routes=branch.routes,
        )
    if branch.is_plain:
        kernels = few_rows.kernels_for(x, inner_group, outer_group, impl=impl)
        if kernels is not None:
            return _of_few_rows(kernels, x, norm, branch, activation, impl)
    inner, outer = products(x, branch, impl)
    call = _MlpCall(
        norm=norm,
        inner=inner,
        outer=outer,
        grad_padding_columns=branch.grad_padding_columns,
        impl=impl,
        rerun=branch.rerun,
        activation=activation,
    )
    out: Tensor = _MlpBlock.apply(x, norm.weight, call, *call.tensors())
    return out


def _of_few_rows(
    kernels: FewRows, x: Tensor, norm: PreNorm, branch: Branch, activation: str, impl: str | None
) -> Tensor:
    rows, inner = as_rows(x), branch.inner
    norms = launchers.rms_norm(backends.select("rms_norm", x.device, x.dtype, impl))
    gates = launchers.glu(backends.select("glu", x.device, x.dtype, impl))
    normed = torch.empty_like(rows)
    rstd = torch.empty(rows.shape[0], dtype=accumulate_dtype(x.dtype), device=x.device)
    norms.rms_norm_fwd(rows, None, norm.weight, normed, None, rstd, norm.eps, norm.offset)
    gate, up = few_rows.lora_linear(kernels, normed, inner).split(inner.out_features, dim=1)
    hidden = x.new_empty(rows.shape[0], branch.outer.in_features)
    gates.glu_fwd(gate, up, hidden, activation=activation)
    return few_rows.lora_linear(kernels, hidden, branch.outer, rows).view(x.shape)


@dataclass(frozen=True)
class _MlpCall(Call):
    activation: str


class _Needs(NamedTuple):
    """Which of the function's inputs before the adapters' tensors need a gradient."""

    x: bool
    norm_weight: bool
    call: bool


class _Gradients(NamedTuple):
    """The gradients of those inputs."""

    x: Tensor | None
    norm_weight: Tensor | None
    call: None = None


class _Kept(NamedTuple):
    call: _MlpCall
    shape: torch.Size  # of x


class _Saved(NamedTuple):
    """What the backward pass reads."""

    x: Tensor  # [M, H]
    rstd: Tensor  # [M]
    s: Tensor  # [M, R]
    gate_up: Tensor  # [M, 2 I]
    outer_s: Tensor  # [M, R] of the down projection
    unscaled: Tensor | None  # as gate_up, before DoRA's scale
    outer_unscaled: Tensor | None  # [M, H], likewise


class _MlpBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context[_Kept],
        x: Tensor,
        norm_weight: Tensor,
        call: _MlpCall,
        *tensors: Tensor | None,
    ) -> Tensor:
        rows = as_rows(x)
        inner, outer = call.inner.group, call.outer.group
        unread = call.is_unread("mlp_block")
        xs, rstd, copy = call.normed(rows, unread=unread)
        s = torch.empty(rows.shape[0], inner.padded_rank, dtype=x.dtype, device=x.device)
        gate_up, unscaled = call.inner.forward(xs, copy=s)
        gate, up = gate_up.split_with_sizes(inner.out_features, dim=1)
        width = outer.in_features
        hs = empty_rows(rows.shape[0], width + outer.padded_rank, dtype=x.dtype, device=x.device)
        outer_s = torch.empty(rows.shape[0], outer.padded_rank, dtype=x.dtype, device=x.device)
        h, s_behind = hs.split_with_sizes((width, outer.padded_rank), dim=1)
        activate(call, gate, up, h, s_behind, outer_s, call.activation)
        if unread:
            y, outer_unscaled = torch.empty_like(rows), None
        else:
            y, outer_unscaled = call.outer.forward_with(h, s_behind, rows, hs, copy)
        ctx.kept = _Kept(call, x.shape)
        saved = _Saved(
            x=rows,
            rstd=rstd,
            s=s,
            gate_up=gate_up,
            outer_s=outer_s,
            unscaled=unscaled,
            outer_unscaled=outer_unscaled,
        )
        # The parameters too, so that autograd notices where one was changed in between.
        ctx.save_for_backward(*saved, norm_weight, *tensors)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context[_Kept], dy: Tensor) -> tuple[Tensor | None, ...]:
        call, shape = ctx.kept
        saved, _ = named_first(_Saved, ctx.saved_tensors)
        asked, of_factors = named_first(_Needs, ctx.needs_input_grad)
        x = saved.x
        inner, outer = call.inner, call.outer
        inner.begin_backward()
        outer.begin_backward()
        needs, outer_needs = call.split(of_factors)
        wanted, outer_wanted = inner.wanted(needs), outer.wanted(outer_needs)

        d_out = outer.claim_gradient([dy])
        outer_ds, outer_d_b = outer.fill_ds(d_out, saved.outer_s, outer_wanted)
        dh = outer.input_gradient(d_out)
        parts = augmented.empty(
            x.shape[0],
            list(inner.group.out_features),
            inner.group.padded_rank,
            dtype=x.dtype,
            device=x.device,
            zeros=False,
        )
        scaled = call.scaled_ds(x, saved.rstd, wants_a=wanted.lora_a)
        dys, made = activate_backward(
            call,
            dh,
            saved.gate_up,
            parts,
            saved.s,
            outer_ds,
            wanted,
            outer_wanted,
            scaled,
            call.activation,
        )
        del dh
        dx, dweight, d_a = call.inner_gradients(
            as_rows(dy),
            dys,
            made.inner_ds,
            scaled,
            x,
            saved.rstd,
            (asked.x, asked.norm_weight),
            wanted,
        )
        grads = _Gradients(
            x=None if dx is None else augmented.keep_padding(dx, dx.view(shape)),
            norm_weight=dweight,
        )
        return (
            *grads,
            *inner.factor_gradients(needs, d_a, made.inner_d_b, parts, saved.unscaled),
            *outer.factor_gradients(
                outer_needs, made.outer_d_a, outer_d_b, [dy], saved.outer_unscaled
            ),
        )
