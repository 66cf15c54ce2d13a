"""The two halves of a decoder layer, each one autograd function.

    attention_block:  x + out(attention(qkv(norm(x))))
    mlp_block:        x + down(glu(gate_up(norm(x))))

Between the products nothing is saved that one pointwise pass gives again. For a token: x and the
norm's 1 / rms, S of both groups, q, k, v and attention's output (or gate and up). The norm's output
and the activation are made again in the backward pass, where their gradients are being read anyway.
The residual is added by the product that makes the branch's output, and its gradient by the norm's
backward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_engine import backends
from lora_engine.ops import augmented
from lora_engine.ops.attention import check_parents
from lora_engine.ops.augmented_product import AugmentedProduct
from lora_engine.ops.augmented_weight import AugmentedWeight
from lora_engine.ops.lora_linear import make_product
from lora_engine.ops.tensors import accumulate_dtype, as_rows, check, empty_rows, shape_of
from lora_engine.reference import Dropout


@dataclass(frozen=True)
class PreNorm:
    """The RMSNorm before a block: `x / rms(x) * (offset + weight)`."""

    weight: Tensor  # [H]
    eps: float
    offset: float = 0.0


@dataclass(frozen=True)
class Branch:
    """The linears of a block, and what varies from call to call.

    dropouts: of the two groups' adapters; None: no dropout.
    routes: each row's adapter, [...]; None: rows use all.
    grad_tail: spare columns to leave behind the gradient of x, which the block before reads.
    """

    inner: AugmentedWeight
    outer: AugmentedWeight
    dropouts: tuple[Dropout | None, Dropout | None] = (None, None)
    routes: Tensor | None = None
    grad_tail: int = 0


def blocks_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether both blocks have kernels for `device` and `dtype`."""
    operations = ("rms_norm", "glu", "attention", "lora_linear")
    return all(backends.choose(name, device, dtype).impl != "reference" for name in operations)


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
    inner, outer = _products(x, norm, branch, impl)
    check(
        len(inner.weight.out_features) == 2
        and set(inner.weight.out_features) == {outer.weight.in_features},
        f"mlp_block: gate and up {inner.weight.out_features} do not fit down's "
        f"{outer.weight.in_features} inputs",
    )
    call = _Call(norm, inner, outer, branch.grad_tail, {"activation": activation}, impl)
    out: Tensor = _MlpBlock.apply(x, norm.weight, call, *call.tensors())
    return out


def attention_block(
    x: Tensor,  # [..., H]
    norm: PreNorm,
    branch: Branch,
    cu_seqlens: Tensor,  # [S + 1] int32
    cos: Tensor,  # [T, D]
    sin: Tensor,  # [T, D]
    *,
    head_dim: int,
    softmax_scale: float | None = None,
    window: int = 0,
    parents: Tensor | None = None,  # [S] int32
    impl: str | None = None,
) -> Tensor:
    """`x + out(attention(q, k, v))` for `q, k, v = qkv(norm(x))`, in x's dtype.

    Causal attention with rotation as `ops.attention`; `branch.inner` is the group (q, k, v) and
    `branch.outer` the output projection, as for `ops.lora_linear`.

    Raises ValueError where shapes or dtypes do not fit.
    """
    inner, outer = _products(x, norm, branch, impl)
    widths = inner.weight.out_features
    check(
        len(widths) == 3
        and widths[0] == outer.weight.in_features
        and all(width % head_dim == 0 for width in widths),
        f"attention_block: q, k, v {widths} do not fit heads of {head_dim} and the output "
        f"projection's {outer.weight.in_features} inputs",
    )
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    accumulate = accumulate_dtype(x.dtype)
    if parents is not None:
        check_parents(parents, cu_seqlens.numel() - 1, causal=True)
    options = {
        "head_dim": head_dim,
        "scale": scale,
        "causal": True,
        "window": window,
        "parents": parents,
    }
    call = _Call(norm, inner, outer, branch.grad_tail, options, impl)
    out: Tensor = _AttentionBlock.apply(
        x,
        norm.weight,
        call,
        cu_seqlens.contiguous(),
        cos.to(accumulate).contiguous(),
        sin.to(accumulate).contiguous(),
        *call.tensors(),
    )
    return out


def _products(
    x: Tensor, norm: PreNorm, branch: Branch, impl: str | None
) -> tuple[AugmentedProduct, AugmentedProduct]:
    hidden = x.shape[-1]
    check(
        norm.weight.shape == (hidden,) and norm.weight.dtype == x.dtype,
        f"the block's norm {shape_of(norm.weight)} does not fit x {shape_of(x)}",
    )
    check(
        branch.outer.out_features == (hidden,),
        f"the block's output {branch.outer.out_features} does not fit x {shape_of(x)}",
    )
    between = x[..., :1].expand(*x.shape[:-1], branch.outer.in_features)
    inner = make_product(x, branch.inner, branch.dropouts[0], branch.routes, impl)
    outer = make_product(between, branch.outer, branch.dropouts[1], branch.routes, impl)
    check(inner is not None and outer is not None, "a block has no reference: see blocks_available")
    assert inner is not None and outer is not None
    return inner, outer


@dataclass(frozen=True)
class _Call:
    """What a block's function needs besides tensors that get gradients."""

    norm: PreNorm
    inner: AugmentedProduct
    outer: AugmentedProduct
    grad_tail: int
    options: dict[str, Any]
    impl: str | None

    def tensors(self) -> list[Tensor | None]:
        """The function's last inputs: both buffers, then all factors."""
        inner, outer = self.inner.weight, self.outer.weight
        return [inner.buffer, outer.buffer, *inner.factors(), *outer.factors()]

    def split(self, needs: Sequence[bool]) -> tuple[Sequence[bool], Sequence[bool]]:
        """`needs` of the factors, of the inner group and of the outer."""
        count = len(self.inner.weight.factors())
        return needs[:count], needs[count:]

    def kernels(self, operation: str, x: Tensor) -> Any:
        return backends.kernels(operation, backends.select(operation, x.device, x.dtype, self.impl))

    def normed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """norm(x) with room for S behind it, and 1 / rms."""
        rows, cols = x.shape
        width = cols + self.inner.weight.tail
        buffer = empty_rows(rows, width, dtype=x.dtype, device=x.device)
        rstd = torch.empty(rows, dtype=accumulate_dtype(x.dtype), device=x.device)
        self._norm_into(buffer[:, :cols], x, rstd)
        return buffer, rstd

    def _norm_into(self, y: Tensor, x: Tensor, rstd: Tensor) -> None:
        norm = self.norm
        self.kernels("rms_norm", x).rms_norm_fwd(
            x, None, norm.weight, y, None, rstd, norm.eps, norm.offset
        )

    def inner_gradients(
        self,
        dy: Tensor,  # [M, H]: of the block's output, that is of the residual too
        dys: Tensor,  # [M, N + R]: of the inner products, with dS filled in
        x: Tensor,
        rstd: Tensor,
        needs_x: bool,
        needs_weight: bool,
        wants_a: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, of the norm's weight, and of the inner A."""
        rows, cols = x.shape
        if not (needs_x or needs_weight):
            normed = torch.empty_like(x)
            self._norm_into(normed, x, rstd)
            return None, None, self.inner.lora_a_gradient(dys, normed, wanted=wants_a)
        d_normed = self.inner.input_gradient(dys)
        (dx,) = augmented.empty(rows, [cols], self.grad_tail, dtype=x.dtype, device=x.device)
        dweight = rstd.new_empty(cols) if needs_weight else None
        self.kernels("rms_norm", x).rms_norm_bwd(
            d_normed, dy, x, self.norm.weight, rstd, dx, dweight, self.norm.offset
        )
        normed = d_normed  # its gradient is used up; 1 / rms is written again as it was
        self._norm_into(normed, x, rstd)
        d_lora_a = self.inner.lora_a_gradient(dys, normed, wanted=wants_a)
        return dx, None if dweight is None else dweight.to(x.dtype), d_lora_a


class _MlpBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor, call: _Call, *tensors: Tensor | None
    ) -> Tensor:
        rows = as_rows(x)
        inner, outer = call.inner.weight, call.outer.weight
        xs, rstd = call.normed(rows)
        gate_up, unscaled = call.inner.forward(xs)
        gate, up = gate_up.split(list(inner.out_features), dim=1)
        width = outer.in_features
        hs = empty_rows(rows.shape[0], width + outer.tail, dtype=x.dtype, device=x.device)
        call.kernels("glu", x).glu_fwd(gate, up, hs[:, :width], **call.options)
        y, outer_unscaled = call.outer.forward(hs, residual=rows)
        ctx.call, ctx.shape = call, x.shape
        ctx.save_for_backward(
            rows,
            rstd,
            xs[:, inner.in_features :].clone(),
            gate_up,
            hs[:, width:].clone(),
            unscaled,
            outer_unscaled,
            norm_weight,
            *tensors,
        )
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        x, rstd, s, gate_up, outer_s, unscaled, outer_unscaled, *_ = ctx.saved_tensors
        inner, outer = call.inner, call.outer
        needs, outer_needs = call.split(ctx.needs_input_grad[5:])
        wants_a, wants_b = inner.wants(needs)
        outer_wants_a, outer_wants_b = outer.wants(outer_needs)

        d_out = outer.claim_gradient([dy])
        outer_d_b = outer.fill_ds(d_out, outer_s, wanted=outer_wants_b)
        dh = outer.input_gradient(d_out)
        gate, up = gate_up.split(list(inner.weight.out_features), dim=1)
        parts = augmented.empty(
            x.shape[0],
            list(inner.weight.out_features),
            inner.weight.tail,
            dtype=x.dtype,
            device=x.device,
        )
        h = dh  # the activation takes the place of its gradient
        call.kernels("glu", x).glu_bwd(dh, gate, up, *parts, h, **call.options)
        outer_d_a = outer.lora_a_gradient(d_out, h, wanted=outer_wants_a)
        del dh, h

        dys = inner.claim_gradient(parts)
        d_b = inner.fill_ds(dys, s, wanted=wants_b)
        dx, dweight, d_a = call.inner_gradients(
            as_rows(dy), dys, x, rstd, ctx.needs_input_grad[0], ctx.needs_input_grad[1], wants_a
        )
        return (
            None if dx is None else augmented.keep_room(dx, dx.view(ctx.shape)),
            dweight,
            None,
            None,
            None,
            *inner.factor_gradients(needs, d_a, d_b, parts, unscaled),
            *outer.factor_gradients(outer_needs, outer_d_a, outer_d_b, [dy], outer_unscaled),
        )


class _AttentionBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        call: _Call,
        cu_seqlens: Tensor,
        cos: Tensor,
        sin: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        rows = as_rows(x)
        inner, outer = call.inner.weight, call.outer.weight
        xs, rstd = call.normed(rows)
        qkv, unscaled = call.inner.forward(xs)
        q, k, v = qkv.split(list(inner.out_features), dim=1)
        width = outer.in_features
        os = empty_rows(rows.shape[0], width + outer.tail, dtype=x.dtype, device=x.device)
        heads = width // call.options["head_dim"]
        lse = torch.empty(heads, rows.shape[0], dtype=rstd.dtype, device=x.device)
        call.kernels("attention", x).attention_fwd(
            q, k, v, cu_seqlens, cos, sin, os[:, :width], lse, **call.options
        )
        y, outer_unscaled = call.outer.forward(os, residual=rows)
        ctx.call, ctx.shape = call, x.shape
        ctx.save_for_backward(
            rows,
            rstd,
            xs[:, inner.in_features :].clone(),
            qkv,
            os,
            lse,
            unscaled,
            outer_unscaled,
            cu_seqlens,
            cos,
            sin,
            norm_weight,
            *tensors,
        )
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        x, rstd, s, qkv, os, lse, unscaled, outer_unscaled, *rotation = ctx.saved_tensors
        cu_seqlens, cos, sin = rotation[:3]
        inner, outer = call.inner, call.outer
        width = outer.weight.in_features
        needs, outer_needs = call.split(ctx.needs_input_grad[8:])
        wants_a, wants_b = inner.wants(needs)
        outer_wants_a, outer_wants_b = outer.wants(outer_needs)

        d_out = outer.claim_gradient([dy])
        outer_d_b = outer.fill_ds(d_out, os[:, width:], wanted=outer_wants_b)
        d_o = outer.input_gradient(d_out)
        outer_d_a = outer.lora_a_gradient(d_out, os[:, :width], wanted=outer_wants_a)
        q, k, v = qkv.split(list(inner.weight.out_features), dim=1)
        parts = augmented.empty(
            x.shape[0],
            list(inner.weight.out_features),
            inner.weight.tail,
            dtype=x.dtype,
            device=x.device,
        )
        call.kernels("attention", x).attention_bwd(
            d_o, q, k, v, cu_seqlens, cos, sin, os[:, :width], lse, *parts, **call.options
        )
        del d_o

        dys = inner.claim_gradient(parts)
        d_b = inner.fill_ds(dys, s, wanted=wants_b)
        dx, dweight, d_a = call.inner_gradients(
            as_rows(dy), dys, x, rstd, ctx.needs_input_grad[0], ctx.needs_input_grad[1], wants_a
        )
        return (
            None if dx is None else augmented.keep_room(dx, dx.view(ctx.shape)),
            dweight,
            *[None] * 6,
            *inner.factor_gradients(needs, d_a, d_b, parts, unscaled),
            *outer.factor_gradients(outer_needs, outer_d_a, outer_d_b, [dy], outer_unscaled),
        )
