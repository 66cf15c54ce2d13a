"""The attention half of a decoder layer (pre-norm, rotated: arXiv:1910.07467, arXiv:2104.09864)."""

from collections.abc import Sequence

from torch import Tensor

from lora_engine.reference.attention import attention
from lora_engine.reference.lora_linear import lora_group, lora_linear
from lora_engine.reference.rms_norm import rms_norm
from lora_engine.values import AdaptedLinear, Dropout, PreNorm


def attention_block(
    x: Tensor,  # [..., H], T rows
    norm: PreNorm,
    qkv: Sequence[AdaptedLinear],  # H to Hq D, H to Hkv D, H to Hkv D
    out: AdaptedLinear,  # Hq D to H
    cu_seqlens: Tensor,  # [S + 1] int32
    cos: Tensor,  # [T, D]
    sin: Tensor,  # [T, D]
    *,
    head_dim: int,
    softmax_scale: float | None = None,
    window: int = 0,
    parents: Tensor | None = None,  # [S] int32
    head_norms: tuple[PreNorm, PreNorm] | None = None,
    dropouts: tuple[Dropout | None, Dropout | None] = (None, None),
    routes: Tensor | None = None,  # [...] int64
) -> Tensor:
    """`x + out(attention(q, k, v))` for `q, k, v = qkv(norm(x))`, [..., H] in x's dtype.

    Causal `attention` of heads that are rotated; with `head_norms`, of q and of k, each head is
    normed before (Qwen3: arXiv:2505.09388). `dropouts` are of q, k and v, and of out; they and
    `routes` as for `lora_linear`.
    """
    normed = rms_norm(x, norm.weight, norm.eps, offset=norm.offset)
    parts = lora_group(normed, qkv, dropout=dropouts[0], routes=routes)
    heads = [part.reshape(-1, part.shape[-1] // head_dim, head_dim) for part in parts]
    for i, head_norm in enumerate(head_norms or ()):
        heads[i] = rms_norm(heads[i], head_norm.weight, head_norm.eps, offset=head_norm.offset)
    q, k, v = heads
    options = {"softmax_scale": softmax_scale, "window": window, "parents": parents}
    o = attention(q, k, v, cu_seqlens, cos=cos, sin=sin, **options)  # type: ignore[arg-type]
    o = o.reshape(*x.shape[:-1], -1)
    return lora_linear(o, out, dropout=dropouts[1], routes=routes, residual=x)
