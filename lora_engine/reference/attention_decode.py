"""Softmax attention of one new token of each sequence over the rows of a cache."""

import torch
from torch import Tensor

from lora_engine.reference.numeric import upcast
from lora_engine.reference.rope import rotate


def attention_decode(
    q: Tensor,  # [S, Hq, D]
    k: Tensor,  # [S, Hkv, D]
    v: Tensor,  # [S, Hkv, D]
    keys: Tensor,  # [slots, Hkv, D], written
    values: Tensor,  # [slots, Hkv, D], written
    slots: Tensor,  # [S] int64
    spans: Tensor,  # [P, 2] int64
    cu_spans: Tensor,  # [S + 1] int32
    *,
    cos: Tensor | None = None,  # [S, D]
    sin: Tensor | None = None,  # [S, D]
    softmax_scale: float | None = None,
    window: int = 0,
) -> Tensor:
    """`softmax(scale q Kᵀ) V` of each token, [S, Hq, D] in q's dtype.

    q and k are rotated with cos and sin, k and v go into rows `slots` of the cache, and a token's
    K and V are the rows of its spans (first row, number of rows), its own the last of them.
    """
    if cos is not None and sin is not None:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    keys[slots], values[slots] = k, v
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    heads_per_kv = q.shape[1] // k.shape[1]
    bounds = cu_spans.tolist()
    pieces = []
    for s in range(q.shape[0]):
        mine = spans[bounds[s] : bounds[s + 1]].tolist()
        rows = torch.cat([torch.arange(first, first + count) for first, count in mine])
        rows = rows.to(q.device)[-window:] if window else rows.to(q.device)
        ks = upcast(keys[rows]).repeat_interleave(heads_per_kv, dim=1)
        vs = upcast(values[rows]).repeat_interleave(heads_per_kv, dim=1)
        scores = scale * torch.einsum("hd,khd->hk", upcast(q[s]), ks)
        pieces.append(torch.einsum("hk,khd->hd", scores.softmax(-1), vs))
    out = torch.stack(pieces) if pieces else torch.zeros_like(q)
    return out.to(q.dtype)
