"""What attention's kernels in CUDA C++ read and write: rows at multiples of 16 bytes, rotated."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_engine.backends.torch_attention import heads_of, rotated
from lora_engine.backends.triton.rope import rope

ALIGNMENT = 16  # bytes
DENSE = torch.contiguous_format
# Scores are multiplied by at least so much: -infinity stays what it is.
LEAST_SCALE = 1e-30


def readable(*tensors: Tensor) -> list[Tensor]:
    """The tensors [tokens, columns], or copies of those whose rows are not aligned."""
    return [x if _is_aligned(x) else x.clone(memory_format=DENSE) for x in tensors]


def writable(*tensors: Tensor) -> list[Tensor]:
    """The tensors [tokens, columns], or others in place of those whose rows are not aligned."""
    return [x if _is_aligned(x) else torch.empty_like(x, memory_format=DENSE) for x in tensors]


def copy_back(written: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """What was written in place of a result becomes the result."""
    for found, result in zip(written, results, strict=True):
        if found is not result:
            result.copy_(found)


def rotate(
    q: Tensor,  # [tokens, q_heads head_dim]
    k: Tensor,  # [tokens, kv_heads head_dim]
    cos: Tensor | None,  # [tokens, head_dim] float32
    sin: Tensor | None,  # [tokens, head_dim] float32
    head_dim: int,
) -> list[Tensor]:
    """q and k as the scores have them."""
    queries, keys = heads_of(q, k, head_dim=head_dim)
    return [x.flatten(1) for x in rotated(queries, keys, cos, sin)]


def with_positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Another q and a positive scale, of the same scores: kernels look for the largest unscaled."""
    if scale < 0:
        q, scale = -q, -scale
    return q, max(scale, LEAST_SCALE)


def rotate_back(
    written: Sequence[Tensor],  # of rotated q and k
    results: Sequence[Tensor],  # dq and dk
    cos: Tensor,  # [tokens, head_dim] float32
    sin: Tensor,  # [tokens, head_dim] float32
    head_dim: int,
) -> None:
    """Gradients of q and k out of those of rotated ones, also in place."""
    q, k = heads_of(*written, head_dim=head_dim)
    dq, dk = heads_of(*results, head_dim=head_dim)
    rope(q, k, dq, dk, cos, sin, None, interleaved=False, inverse=True)


def _is_aligned(x: Tensor) -> bool:
    return x.data_ptr() % ALIGNMENT == 0 and x.stride(0) * x.element_size() % ALIGNMENT == 0
