"""Softmax attention within each of several packed sequences, some of which continue others."""

from itertools import pairwise

import torch
from torch import Tensor

from lora_engine.reference.numeric import upcast
from lora_engine.reference.rope import rotate


def attention(
    q: Tensor,  # [T, Hq, D]
    k: Tensor,  # [T, Hkv, D]
    v: Tensor,  # [T, Hkv, D]
    cu_seqlens: Tensor,  # [S + 1] int32
    *,
    cos: Tensor | None = None,  # [T, D]
    sin: Tensor | None = None,  # [T, D]
    softmax_scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    parents: Tensor | None = None,  # [S] int32
) -> Tensor:
    """`softmax(scale q kᵀ) v` for each head and sequence, [T, Hq, D] in q's dtype.

    Query head h reads key/value head h // (Hq / Hkv). With cos and sin, q and k are rotated first
    and rounded to their dtype. `window` > 0 lets a query see that many keys, itself included.
    Sequence s also sees the sequence `parents[s]` (-1: none), what that one continues, and so on.
    """
    if cos is not None and sin is not None:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    heads_per_kv = q.shape[1] // k.shape[1]
    own = [
        torch.arange(begin, end, device=q.device) for begin, end in pairwise(cu_seqlens.tolist())
    ]
    seen: list[Tensor] = []
    for s, tokens in enumerate(own):
        parent = -1 if parents is None else int(parents[s])
        seen.append(tokens if parent < 0 else torch.cat((seen[parent], tokens)))
    pieces = []
    for queries, keys in zip(own, seen, strict=True):
        qs = upcast(q[queries]).transpose(0, 1)
        ks = upcast(k[keys]).transpose(0, 1).repeat_interleave(heads_per_kv, dim=0)
        vs = upcast(v[keys]).transpose(0, 1).repeat_interleave(heads_per_kv, dim=0)
        scores = scale * (qs @ ks.transpose(1, 2))
        position = torch.arange(keys.numel(), device=q.device)
        distance = position[keys.numel() - queries.numel() :, None] - position[None, :]
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if causal:
            hidden |= distance < 0
        if window:
            hidden |= distance >= window
        probs = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        pieces.append((probs @ vs).transpose(0, 1))
    out = torch.cat(pieces) if pieces else torch.zeros_like(q)
    return out.to(q.dtype)
