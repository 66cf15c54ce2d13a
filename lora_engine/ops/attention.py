"""Attention within each of several packed sequences, with its gradient."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lora_engine import backends, reference
from lora_engine.backends import contracts, launchers
from lora_engine.backends.request import Heads
from lora_engine.ops import augmented
from lora_engine.ops.context import Context
from lora_engine.ops.once_differentiable import once_differentiable
from lora_engine.ops.tensors import accumulate_dtype, as_rows, check, shape_of


def attention(
    q: Tensor,  # [T, Hq, D], or [..., Hq D] with head_dim
    k: Tensor,  # [T, Hkv, D], or [..., Hkv D]
    v: Tensor,  # [T, Hkv, D], or [..., Hkv D]
    cu_seqlens: Tensor,  # [S + 1] int32
    *,
    head_dim: int | None = None,
    cos: Tensor | None = None,  # [T, D]
    sin: Tensor | None = None,  # [T, D]
    softmax_scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    parents: Tensor | None = None,  # [S] int32
    equal_lengths: bool = False,
    padding_columns: int = 0,
    grad_padding_columns: int = 0,
    impl: str | None = None,
) -> Tensor:
    """`softmax(scale q kᵀ) v` within each sequence, q's shape and dtype (arXiv:2307.08691).

    Sequence s is tokens `cu_seqlens[s]` to `cu_seqlens[s + 1]`; together they cover all T. Query
    head h reads key/value head `h // (Hq / Hkv)`. With cos and sin, q and k are rotated on the way
    in (`ops.rope`), and their gradients back on the way out. `softmax_scale` defaults to D^-1/2.
    `window` > 0 lets a query see that many keys, itself included (causal only). With `parents`
    (causal only) sequence s continues the earlier sequence `parents[s]`, if that is not -1: its
    queries see that one's tokens and whatever that one continues, then their own, as though all
    stood in one sequence, and the gradients of k and v sum over all that saw them.
    `equal_lengths` says that all sequences have the same number of tokens, which only the caller
    knows without waiting for a GPU: there are faster kernels for that.
    `padding_columns` leaves columns behind each token of the result for `ops.lora_linear`,
    `grad_padding_columns` behind the gradients of q, k and v, which lie side by side in one buffer.
    Memory beyond the result is one float a token and head.

    Raises ValueError where shapes, dtypes, sequence bounds or parents do not fit.
    """
    if head_dim is None:
        check(q.dim() == 3, f"attention: q {shape_of(q)} is not [T, Hq, D]; or give head_dim")
        dim = q.shape[-1]
        out = attention(
            q.flatten(1),
            k.flatten(1),
            v.flatten(1),
            cu_seqlens,
            head_dim=dim,
            cos=cos,
            sin=sin,
            softmax_scale=softmax_scale,
            causal=causal,
            window=window,
            parents=parents,
            equal_lengths=equal_lengths,
            impl=impl,
        )
        return out.view(q.shape)
    _check(q, k, v, cu_seqlens, head_dim, cos, sin, causal, window)
    if parents is not None:
        check_parents(parents, cu_seqlens.numel() - 1, causal)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    heads = heads_of(
        head_dim, cu_seqlens, q.numel() // max(1, q.shape[-1]), parents, window, equal_lengths
    )
    asked = impl
    impl = backends.select("attention", q.device, q.dtype, asked, sizes=heads)
    if impl == "reference":
        qs, ks, vs = (x.unflatten(-1, (-1, head_dim)).flatten(0, -3) for x in (q, k, v))
        return reference.attention(
            qs,
            ks,
            vs,
            cu_seqlens,
            cos=cos,
            sin=sin,
            softmax_scale=scale,
            causal=causal,
            window=window,
            parents=parents,
        ).view(q.shape)
    accumulate = accumulate_dtype(q.dtype)
    result: Tensor = _Attention.apply(
        q,
        k,
        v,
        cu_seqlens.contiguous(),
        None if cos is None else cos.to(accumulate).contiguous(),
        None if sin is None else sin.to(accumulate).contiguous(),
        _Call(
            head_dim=head_dim,
            scale=scale,
            causal=causal,
            window=window,
            parents=parents,
            padding_columns=padding_columns,
            grad_padding_columns=grad_padding_columns,
            kernels=kernels_for(q, heads, impl, asked),
        ),
    )
    return result


def kernels_for(x: Tensor, heads: Heads, impl: str, asked: str | None) -> contracts.Attention:
    """What launches attention for tensors like x, of the implementation that was chosen.

    asked: the implementation that a caller forces.
    """
    plan = backends.attention_plan(x.device, x.dtype, heads, asked)
    return launchers.attention(impl) if plan == "tiles" else launchers.attention_by_plan(plan)


def heads_of(
    head_dim: int,
    cu_seqlens: Tensor,  # [S + 1]
    tokens: int,
    parents: Tensor | None,
    window: int,
    equal_lengths: bool,
) -> Heads:
    """What attention is chosen by. ValueError if so many tokens cannot be equal sequences."""
    repeatable = torch.are_deterministic_algorithms_enabled()
    kind = Heads(
        head_dim=head_dim, parents=parents is not None, window=window > 0, repeatable=repeatable
    )
    sequences = cu_seqlens.numel() - 1
    if not equal_lengths or sequences < 1:
        return kind
    check(tokens % sequences == 0, f"attention: {tokens} tokens are no {sequences} equal sequences")
    return kind._replace(length=tokens // sequences)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    head_dim: int,
    cos: Tensor | None,
    sin: Tensor | None,
    causal: bool,
    window: int,
) -> None:
    shapes = f"q {shape_of(q)}, k {shape_of(k)}, v {shape_of(v)}"
    check(
        q.shape[:-1] == k.shape[:-1] and k.shape == v.shape,
        f"attention: tokens differ, or k and v: {shapes}",
    )
    check(
        head_dim > 0
        and head_dim % 2 == 0
        and q.shape[-1] % head_dim == k.shape[-1] % head_dim == 0,
        f"attention: head size {head_dim} is odd or does not divide: {shapes}",
    )
    heads, kv_heads = q.shape[-1] // head_dim, k.shape[-1] // head_dim
    check(
        kv_heads > 0 and heads % kv_heads == 0,
        f"attention: {heads} query heads are no multiple of {kv_heads} key heads: {shapes}",
    )
    tokens = q[..., 0].numel()
    check(q.dtype == k.dtype == v.dtype, f"attention: dtypes differ: {shapes}")
    check(window == 0 or causal, "attention: window needs causal=True")
    check((cos is None) == (sin is None), "attention: give both cos and sin, or neither")
    if cos is not None and sin is not None:
        expected = (tokens, head_dim)
        check(
            cos.shape == expected and sin.shape == expected,
            f"attention: cos {shape_of(cos)}, sin {shape_of(sin)}: expected {list(expected)}",
        )
    check(
        cu_seqlens.dim() == 1 and cu_seqlens.dtype == torch.int32 and cu_seqlens.numel() >= 1,
        f"attention: cu_seqlens {shape_of(cu_seqlens)} is not [S + 1] int32",
    )
    check(
        cu_seqlens.device == q.device,
        f"attention: cu_seqlens is on {cu_seqlens.device}, q on {q.device}",
    )
    if backends.reads_at_once(cu_seqlens):
        bounds = cu_seqlens.tolist()
        rising = all(a <= b for a, b in pairwise(bounds))
        check(
            bounds[0] == 0 and bounds[-1] == tokens and rising,
            f"attention: cu_seqlens must rise from 0 to {tokens}, got {bounds[:8]}…",
        )


def check_parents(parents: Tensor, sequences: int, causal: bool) -> None:
    """Raises ValueError unless every sequence continues an earlier one or none (-1)."""
    check(causal, "attention: parents needs causal=True")
    check(
        parents.shape == (sequences,) and parents.dtype == torch.int32 and parents.is_contiguous(),
        f"attention: parents {shape_of(parents)} is not [{sequences}] int32",
    )
    if backends.reads_at_once(parents):
        check(
            all(-1 <= parent < s for s, parent in enumerate(parents.tolist())),
            f"attention: parents must be -1 or an earlier sequence, got {parents.tolist()[:8]}…",
        )


class _Call(NamedTuple):
    """One call of `attention`, besides its differentiable inputs and what the kernels read."""

    head_dim: int
    scale: float
    causal: bool
    window: int
    parents: Tensor | None  # [S] int32
    padding_columns: int
    grad_padding_columns: int
    kernels: contracts.Attention


class _Kept(NamedTuple):
    call: _Call
    leading: torch.Size  # of q, before its columns


class _Gradients(NamedTuple):
    """The gradients of the function's inputs."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: None = None
    cos: None = None
    sin: None = None
    call: None = None


class _Saved(NamedTuple):
    """What the backward pass reads."""

    q: Tensor  # [T, Hq D]
    k: Tensor  # [T, Hkv D]
    v: Tensor  # [T, Hkv D]
    cu_seqlens: Tensor  # [S + 1] int32
    cos: Tensor | None  # [T, D]
    sin: Tensor | None  # [T, D]
    o: Tensor  # [T, Hq D]
    lse: Tensor  # [Hq, T]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context[_Kept],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        call: _Call,
    ) -> Tensor:
        shape = q.shape
        q, k, v = as_rows(q), as_rows(k), as_rows(v)
        tokens, width = q.shape
        (o,) = augmented.empty(
            tokens, [width], call.padding_columns, dtype=q.dtype, device=q.device
        )
        heads, dtype = width // call.head_dim, accumulate_dtype(q.dtype)
        lse = torch.empty(heads, tokens, dtype=dtype, device=q.device)
        call.kernels.attention_fwd(
            q,
            k,
            v,
            cu_seqlens,
            cos,
            sin,
            o,
            lse,
            head_dim=call.head_dim,
            scale=call.scale,
            causal=call.causal,
            window=call.window,
            parents=call.parents,
        )
        ctx.save_for_backward(
            *_Saved(q=q, k=k, v=v, cu_seqlens=cu_seqlens, cos=cos, sin=sin, o=o, lse=lse)
        )
        ctx.kept = _Kept(call, shape[:-1])
        return augmented.keep_padding(o, o.view(shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Context[_Kept], d_o: Tensor) -> _Gradients:
        call, leading = ctx.kept
        saved = _Saved(*ctx.saved_tensors)
        q, k, v = saved.q, saved.k, saved.v
        widths = [q.shape[1], k.shape[1], v.shape[1]]
        dq, dk, dv = augmented.empty(
            q.shape[0], widths, call.grad_padding_columns, dtype=q.dtype, device=q.device
        )
        call.kernels.attention_bwd(
            as_rows(d_o),
            q,
            k,
            v,
            saved.cu_seqlens,
            saved.cos,
            saved.sin,
            saved.o,
            saved.lse,
            dq,
            dk,
            dv,
            head_dim=call.head_dim,
            scale=call.scale,
            causal=call.causal,
            window=call.window,
            parents=call.parents,
        )

        def shaped(grad: Tensor) -> Tensor:
            return augmented.keep_padding(grad, grad.view(*leading, grad.shape[1]))

        return _Gradients(q=shaped(dq), k=shaped(dk), v=shaped(dv))
