"""Calls of the attention kernels that the tuner measures: causal, in packed sequences."""

import math

import torch
from torch import Tensor

from benchmarks.common.measure import Matmul
from benchmarks.gpu.tune_cases import Call, empty, kernel, moved, normal

# Llama 3.1 8B, Qwen3 4B, SmolLM2 135M, and a wide head; sequences of equal length.
_SIZES = [
    {"tokens": tokens, "length": length, "heads": heads, "kv_heads": kv_heads, "dim": dim}
    for heads, kv_heads, dim in ((32, 8, 128), (9, 3, 64), (8, 4, 256))
    for tokens, length in ((8192, 2048), (8192, 8192), (2048, 512))
]
_TINY = {"tokens": 48, "length": 24, "heads": 2, "kv_heads": 1, "dim": 16}
# Products of a query and a key's worth of elements: scores and output; and the same again, twice
# for scores, for their gradients.
_FORWARD, _DQ, _DKV = 2, 3, 4
# With other blocks of keys other probabilities are rounded.
_LOOSER = 4.0


def _by_dim(itemsize: int, *, dim: int, **_: int) -> int:
    return 1 << (dim - 1).bit_length()


def _operands(
    device: torch.device, dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, dim: int
) -> list[Tensor]:
    """q, k and v side by side, as one product writes them."""
    widths = [heads * dim, kv_heads * dim, kv_heads * dim]
    return list(normal(device, dtype, tokens, sum(widths)).split(widths, dim=1))


def _bounds(device: torch.device, tokens: int, length: int) -> Tensor:
    return torch.arange(0, tokens + 1, length, dtype=torch.int32, device=device)


def _products(count: int, tokens: int, length: int, heads: int, dim: int) -> tuple[Matmul, ...]:
    """As much arithmetic as half of all pairs of a sequence take."""
    return (Matmul(tokens, max(1, length // 2), heads * dim),) * count


def _options(dim: int) -> dict[str, object]:
    return {"head_dim": dim, "scale": dim**-0.5, "causal": True, "window": 0}


@kernel("attention_fwd", _SIZES, _by_dim, tiny=_TINY)
def _attention_fwd(
    device: torch.device,
    dtype: torch.dtype,
    *,
    tokens: int,
    length: int,
    heads: int,
    kv_heads: int,
    dim: int,
) -> Call:
    from lora_engine.backends.triton import attention

    q, k, v = _operands(device, dtype, tokens, heads, kv_heads, dim)
    bounds = _bounds(device, tokens, length)
    o = empty(device, dtype, tokens, heads * dim)
    lse = empty(device, torch.float32, heads, tokens)
    return Call(
        lambda: attention.attention_fwd(q, k, v, bounds, None, None, o, lse, **_options(dim)),
        (o, lse),
        moved(q, k, v, o, lse),
        matmuls=_products(_FORWARD, tokens, length, heads, dim),
        looser=_LOOSER,
    )


def _attention_bwd(
    device: torch.device,
    dtype: torch.dtype,
    *,
    tokens: int,
    length: int,
    heads: int,
    kv_heads: int,
    dim: int,
) -> Call:
    """Both kernels of the backward pass; lse is about what such scores have."""
    from lora_engine.backends.triton import attention

    q, k, v = _operands(device, dtype, tokens, heads, kv_heads, dim)
    bounds = _bounds(device, tokens, length)
    d_o, o = (normal(device, dtype, tokens, heads * dim) for _ in range(2))
    lse = torch.full((heads, tokens), math.log(length) + 0.5, device=device)
    gradients = tuple(empty(device, dtype, *x.shape) for x in (q, k, v))
    return Call(
        lambda: attention.attention_bwd(
            d_o, q, k, v, bounds, None, None, o, lse, *gradients, **_options(dim)
        ),
        gradients,
        moved(d_o, q, k, v, o, lse, *gradients),
        matmuls=_products(_DQ + _DKV, tokens, length, heads, dim),
        looser=_LOOSER,
    )


kernel("attention_bwd_dq", _SIZES, _by_dim, tiny=_TINY)(_attention_bwd)
kernel("attention_bwd_dkv", _SIZES, _by_dim, tiny=_TINY)(_attention_bwd)
