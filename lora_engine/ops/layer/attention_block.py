"""The attention half of a decoder layer as one autograd function; see ops/layer/blocks.py."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_engine import reference
from lora_engine.backends import contracts
from lora_engine.backends.request import Heads
from lora_engine.ops import augmented
from lora_engine.ops.attention import check_parents, heads_of, kernels_for
from lora_engine.ops.context import Context, named_first
from lora_engine.ops.layer.blocks import Branch, Call, check_branch, implementation, products
from lora_engine.ops.layer.head_norms import norm_heads, norm_heads_backward
from lora_engine.ops.lora.linear import adapted_linears
from lora_engine.ops.once_differentiable import once_differentiable
from lora_engine.ops.tensors import (
    accumulate_dtype,
    as_rows,
    check,
    empty_rows,
    shape_of,
    without_autocast,
)
from lora_engine.values import PreNorm


@without_autocast
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
    equal_lengths: bool = False,
    head_norms: tuple[PreNorm, PreNorm] | None = None,
    impl: str | None = None,
) -> Tensor:
    """`x + out(attention(q, k, v))` for `q, k, v = qkv(norm(x))`, in x's dtype.

    Causal attention with rotation as `ops.attention`; `branch.inner` is the group (q, k, v) and
    `branch.outer` the output projection, as for `ops.lora_linear`. With `head_norms`, of q and of
    k, each of their heads is normed before it is rotated; the weights [D] get gradients.

    Raises ValueError where shapes or dtypes do not fit.
    """
    check_branch(x, norm, branch)
    widths, width = branch.inner.out_features, branch.outer.in_features
    check(
        len(widths) == 3 and widths[0] == width and all(width % head_dim == 0 for width in widths),
        lambda: (
            f"attention_block: q, k, v {widths} do not fit heads of {head_dim} and the output "
            f"projection's {width} inputs"
        ),
    )
    if parents is not None:
        check_parents(parents, cu_seqlens.numel() - 1, causal=True)
    for head_norm in head_norms or ():
        check(
            head_norm.weight.shape == (head_dim,) and head_norm.weight.dtype == x.dtype,
            f"attention_block: the heads' norm {shape_of(head_norm.weight)} does not fit heads of "
            f"{head_dim} in {shape_of(x)}",
        )
    tokens = x.numel() // max(1, x.shape[-1])
    check(
        cos.shape == sin.shape == (tokens, head_dim),
        lambda: (
            f"attention_block: cos {shape_of(cos)} and sin {shape_of(sin)} do not fit {tokens} "
            f"tokens and heads of {head_dim}"
        ),
    )
    heads = heads_of(head_dim, cu_seqlens, tokens, parents, window, equal_lengths)
    if implementation("attention_block", x, branch, impl, heads) == "reference":
        (out_projection,) = adapted_linears(branch.outer)
        return reference.attention_block(
            augmented.operand(x),
            norm,
            adapted_linears(branch.inner),
            out_projection,
            cu_seqlens,
            cos,
            sin,
            head_dim=head_dim,
            softmax_scale=softmax_scale,
            window=window,
            parents=parents,
            head_norms=head_norms,
            dropouts=branch.dropouts,
            routes=branch.routes,
        )
    accumulate = accumulate_dtype(x.dtype)
    inner, outer = products(x, branch, impl)
    call = _AttentionCall(
        norm=norm,
        inner=inner,
        outer=outer,
        grad_padding_columns=branch.grad_padding_columns,
        impl=impl,
        rerun=branch.rerun,
        heads=heads,
        scale=head_dim**-0.5 if softmax_scale is None else softmax_scale,
        window=window,
        parents=parents,
        head_norms=head_norms,
    )
    out: Tensor = _AttentionBlock.apply(
        x,
        norm.weight,
        call,
        *((None, None) if head_norms is None else (norm.weight for norm in head_norms)),
        cu_seqlens.contiguous(),
        cos.to(accumulate).contiguous(),
        sin.to(accumulate).contiguous(),
        *call.tensors(),
    )
    return out


@dataclass(frozen=True)
class _AttentionCall(Call):
    heads: Heads
    scale: float
    window: int
    parents: Tensor | None  # [S] int32
    head_norms: tuple[PreNorm, PreNorm] | None  # of q and of k

    @property
    def head_dim(self) -> int:
        return self.heads.head_dim

    def attention_kept(self) -> tuple[Tensor, Tensor] | None:
        """Attention's output and log-sum-exp, where the first run of this call kept them."""
        return None if self.rerun is None else self.rerun.attention

    def keep_attention(self, os: Tensor, lse: Tensor) -> None:
        """Keeps them for the second run, where they are to be kept."""
        if self.rerun is not None and self.rerun.keeps_attention:
            self.rerun.attention = os, lse

    def attention_kernels(self, x: Tensor) -> contracts.Attention:
        """What launches attention for tensors like x."""
        return kernels_for(x, self.heads, self.implementation("attention", x), self.impl)


class _Needs(NamedTuple):
    """Which of the function's inputs before the adapters' tensors need a gradient."""

    x: bool
    norm_weight: bool
    call: bool
    q_weight: bool
    k_weight: bool
    cu_seqlens: bool
    cos: bool
    sin: bool


class _Gradients(NamedTuple):
    """The gradients of those inputs."""

    x: Tensor | None
    norm_weight: Tensor | None
    call: None = None
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    cu_seqlens: None = None
    cos: None = None
    sin: None = None


class _Kept(NamedTuple):
    call: _AttentionCall
    shape: torch.Size  # of x


class _Saved(NamedTuple):
    """What the backward pass reads."""

    x: Tensor  # [M, H]
    rstd: Tensor  # [M]
    s: Tensor  # [M, R]
    qkv: Tensor  # [M, Nq + Nk + Nv]
    os: Tensor  # [M, Nq + R]: attention's output with the outer S behind it
    lse: Tensor  # [heads, M]
    unscaled: Tensor | None  # as qkv, before DoRA's scale
    outer_unscaled: Tensor | None  # [M, H], likewise
    cu_seqlens: Tensor
    cos: Tensor
    sin: Tensor


class _AttentionBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context[_Kept],
        x: Tensor,
        norm_weight: Tensor,
        call: _AttentionCall,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        cu_seqlens: Tensor,
        cos: Tensor,
        sin: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        rows = as_rows(x)
        inner, outer = call.inner.group, call.outer.group
        unread = call.is_unread("attention_block")
        xs, rstd, copy = call.normed(rows, unread=unread)
        s = torch.empty(rows.shape[0], inner.padded_rank, dtype=x.dtype, device=x.device)
        qkv, unscaled = call.inner.forward(xs, copy=s)
        os, lse = call.attention_kept() or _attend(call, qkv, rstd, cu_seqlens, cos, sin)
        call.keep_attention(os, lse)
        attended = augmented.Joined.of(os, outer.in_features)
        if unread:
            call.outer.fill_s(attended.front, attended.behind)
            y, outer_unscaled = torch.empty_like(rows), None
        else:
            y, outer_unscaled = call.outer.forward(attended, residual=rows, residual_copy=copy)
        ctx.kept = _Kept(call, x.shape)
        saved = _Saved(
            x=rows,
            rstd=rstd,
            s=s,
            qkv=qkv,
            os=os,
            lse=lse,
            unscaled=unscaled,
            outer_unscaled=outer_unscaled,
            cu_seqlens=cu_seqlens,
            cos=cos,
            sin=sin,
        )
        # The parameters too, so that autograd notices where one was changed in between.
        ctx.save_for_backward(*saved, norm_weight, q_weight, k_weight, *tensors)
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
        widths = outer.group.in_features, outer.group.padded_rank
        o, outer_s = saved.os.split_with_sizes(widths, dim=1)
        needs, outer_needs = call.split(of_factors)
        wanted, outer_wanted = inner.wanted(needs), outer.wanted(outer_needs)

        d_out = outer.claim_gradient([dy])
        outer_ds, outer_d_b = outer.fill_ds(d_out, outer_s, outer_wanted)
        d_o = outer.input_gradient(d_out)
        outer_d_a = outer.lora_a_gradient(outer_ds, o, outer_wanted)
        raw_q, raw_k, v = saved.qkv.split_with_sizes(inner.group.out_features, dim=1)
        q, k = raw_q, raw_k
        rstd_heads: list[Tensor] | None = None
        if call.head_norms is not None:
            q, k, rstd_heads = norm_heads(call, call.head_norms, q, k)
        parts = augmented.empty(
            x.shape[0],
            list(inner.group.out_features),
            inner.group.padded_rank,
            dtype=x.dtype,
            device=x.device,
            zeros=False,
        )
        call.attention_kernels(x).attention_bwd(
            d_o,
            q,
            k,
            v,
            saved.cu_seqlens,
            saved.cos,
            saved.sin,
            o,
            saved.lse,
            *parts,
            head_dim=call.head_dim,
            scale=call.scale,
            causal=True,
            window=call.window,
            parents=call.parents,
        )
        del d_o, q, k
        d_head_norms: list[Tensor | None] = [None, None]
        if call.head_norms is not None and rstd_heads is not None:
            d_head_norms = norm_heads_backward(
                call,
                call.head_norms,
                (raw_q, raw_k),
                rstd_heads,
                parts[:2],
                (asked.q_weight, asked.k_weight),
            )

        dys = inner.claim_gradient(parts)
        scaled = call.scaled_ds(x, saved.rstd, wants_a=wanted.lora_a)
        ds, d_b = inner.fill_ds(dys, saved.s, wanted, scaled)
        dx, dweight, d_a = call.inner_gradients(
            as_rows(dy),
            dys,
            ds,
            scaled,
            x,
            saved.rstd,
            (asked.x, asked.norm_weight),
            wanted,
        )
        grads = _Gradients(
            x=None if dx is None else augmented.keep_padding(dx, dx.view(shape)),
            norm_weight=dweight,
            q_weight=d_head_norms[0],
            k_weight=d_head_norms[1],
        )
        return (
            *grads,
            *inner.factor_gradients(needs, d_a, d_b, parts, saved.unscaled),
            *outer.factor_gradients(outer_needs, outer_d_a, outer_d_b, [dy], saved.outer_unscaled),
        )


def _attend(
    call: _AttentionCall,
    qkv: Tensor,  # [M, Nq + Nk + Nv]
    rstd: Tensor,  # of the type arithmetic is done in
    cu_seqlens: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """Attention's output with place for the outer S behind it, and its log-sum-exp."""
    inner, outer, rows = call.inner.group, call.outer.group, qkv.shape[0]
    q, k, v = qkv.split_with_sizes(inner.out_features, dim=1)
    if call.head_norms is not None:
        q, k, _ = norm_heads(call, call.head_norms, q, k)
    width = outer.in_features
    os = empty_rows(rows, width + outer.padded_rank, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(width // call.head_dim, rows, dtype=rstd.dtype, device=qkv.device)
    call.attention_kernels(qkv).attention_fwd(
        q,
        k,
        v,
        cu_seqlens,
        cos,
        sin,
        os[:, :width],
        lse,
        head_dim=call.head_dim,
        scale=call.scale,
        causal=True,
        window=call.window,
        parents=call.parents,
    )
    return os, lse
