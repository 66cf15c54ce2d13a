"""Attention within each of several packed sequences, some of which continue others.

The kernels are in attention_fwd.py and attention_bwd.py. Rotation is a launch of its own.
"""

import torch
import triton
from lora_engine.backends.triton import launch
from lora_engine.backends.triton.attention_bwd import (
    _attention_bwd_dkv_kernel,
    _attention_bwd_dq_kernel,
    _attention_last_kernel,
)
from lora_engine.backends.triton.attention_fwd import _attention_fwd_kernel
from lora_engine.backends.triton.rope import rope
from torch import Tensor

PRECISION = "tf32x3"
SMALLEST_DOT = 16
LOG2_E = 1.4426950408889634


def attention_fwd(
    q: Tensor,  # [tokens, q_heads head_dim]
    k: Tensor,  # [tokens, kv_heads head_dim]
    v: Tensor,  # [tokens, kv_heads head_dim]
    cu_seqlens: Tensor,  # [sequences + 1] int32
    cos: Tensor | None,  # [tokens, head_dim] float32
    sin: Tensor | None,  # [tokens, head_dim] float32
    o: Tensor,  # [tokens, q_heads head_dim]
    lse: Tensor,  # [q_heads, tokens] float32
    *,
    head_dim: int,
    scale: float,
    causal: bool,
    window: int,
    parents: Tensor | None = None,  # [sequences] int32
) -> None:
    """Writes o and lse, the logarithm of each query's sum of exponentials.

    Launch size: head_dim rounded up to a power of two.
    """
    if q.numel() == 0:
        return
    q, k = _rotated(q, k, cos, sin, head_dim)
    window = _window(window, q)
    heads = q.shape[1] // head_dim
    strides, vec = _strides(q, k, v, o)
    config = _config("attention_fwd", vec, head_dim, window, parents, k, v)
    _attention_fwd_kernel[_grid(q, cu_seqlens, config["BLOCK_M"], heads)](
        q,
        k,
        v,
        o,
        lse,
        cu_seqlens,
        parents,
        q.shape[0],
        cu_seqlens.numel() - 1,
        heads,
        window,
        abs(scale) * LOG2_E,
        *strides,
        NEGATED=scale < 0,
        CAUSAL=causal,
        WINDOW=window > 0,
        GROUP=q.shape[1] // k.shape[1],
        VEC=vec,
        PRECISION=PRECISION,
        D=head_dim,
        **config,
    )


def attention_bwd(
    d_o: Tensor,  # [tokens, q_heads head_dim]
    q: Tensor,  # [tokens, q_heads head_dim]
    k: Tensor,  # [tokens, kv_heads head_dim]
    v: Tensor,  # [tokens, kv_heads head_dim]
    cu_seqlens: Tensor,  # [sequences + 1] int32
    cos: Tensor | None,  # [tokens, head_dim] float32
    sin: Tensor | None,  # [tokens, head_dim] float32
    o: Tensor,  # [tokens, q_heads head_dim], of the forward pass
    lse: Tensor,  # [q_heads, tokens] float32, of the forward pass
    dq: Tensor,  # [tokens, q_heads head_dim]
    dk: Tensor,  # [tokens, kv_heads head_dim]
    dv: Tensor,  # [tokens, kv_heads head_dim]
    *,
    head_dim: int,
    scale: float,
    causal: bool,
    window: int,
    parents: Tensor | None = None,  # [sequences] int32
) -> None:
    """Writes dq, dk and dv. Launch sizes: as of the forward pass."""
    if q.numel() == 0:
        return
    q, k = _rotated(q, k, cos, sin, head_dim)
    window = _window(window, q)
    heads, kv_heads = q.shape[1] // head_dim, k.shape[1] // head_dim
    sequences = cu_seqlens.numel() - 1
    delta = torch.empty_like(lse)
    options: dict[str, int | str] = {
        "CAUSAL": causal,
        "WINDOW": window > 0,
        "GROUP": heads // kv_heads,
        "PRECISION": PRECISION,
        "D": head_dim,
    }
    strides, vec = _strides(d_o, q, k, v, o, dq)
    config = _config("attention_bwd_dq", vec, head_dim, window, parents, k, v)
    _attention_bwd_dq_kernel[_grid(q, cu_seqlens, config["BLOCK_M"], heads)](
        d_o,
        q,
        k,
        v,
        o,
        lse,
        delta,
        dq,
        cu_seqlens,
        parents,
        q.shape[0],
        sequences,
        heads,
        window,
        scale,
        *strides,
        VEC=vec,
        **options,
        **config,
    )
    last = None
    if parents is not None:
        last = torch.zeros_like(parents)
        _attention_last_kernel[(sequences,)](parents, last, num_warps=1)
    strides, vec = _strides(d_o, q, k, v, dk, dv)
    config = _config("attention_bwd_dkv", vec, head_dim, window, parents, q, d_o)
    _attention_bwd_dkv_kernel[_grid(q, cu_seqlens, config["BLOCK_N"], kv_heads)](
        d_o,
        q,
        k,
        v,
        lse,
        delta,
        dk,
        dv,
        cu_seqlens,
        parents,
        last,
        q.shape[0],
        sequences,
        kv_heads,
        window,
        scale,
        *strides,
        VEC=vec,
        **options,
        **config,
    )
    if cos is not None and sin is not None:
        heads_q, heads_k = (_heads(x, head_dim) for x in (dq, dk))
        rope(
            heads_q,
            heads_k,
            heads_q,
            heads_k,
            cos,
            sin,
            None,
            interleaved=False,
            inverse=True,
        )


def _rotated(
    q: Tensor,  # [tokens, q_heads head_dim]
    k: Tensor,  # [tokens, kv_heads head_dim]
    cos: Tensor | None,  # [tokens, head_dim]
    sin: Tensor | None,  # [tokens, head_dim]
    head_dim: int,
) -> tuple[Tensor, Tensor]:
    """q and k with their heads rotated, in memory of their own; themselves without tables."""
    if cos is None or sin is None:
        return q, k
    results = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
    heads_q, heads_k, q_out, k_out = (_heads(x, head_dim) for x in (q, k, *results))
    rope(heads_q, heads_k, q_out, k_out, cos, sin, None, interleaved=False, inverse=False)
    return results[0], results[1]


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """x [tokens, heads head_dim] as [tokens, heads, head_dim]."""
    return x.view(x.shape[0], -1, head_dim)


def _window(window: int, x: Tensor) -> int:
    """0, which is none, where it holds all tokens."""
    return window if window < x.shape[0] else 0


def _config(
    kernel: str, vec: int, head_dim: int, window: int, parents: Tensor | None, *tensors: Tensor
) -> dict[str, int]:
    """Launch parameters: of `kernel` where `tensors` may be read by tensor descriptors.

    Without, more registers are taken: parents, and heads that are padded, have lines of their own.
    """
    x = tensors[0]
    block = max(SMALLEST_DOT, triton.next_power_of_2(head_dim))
    aligned = vec > 1 and all(y.data_ptr() % 16 == 0 for y in tensors)
    described = aligned and block == head_dim and parents is None
    name = kernel if described else f"{kernel}_pointers" if aligned else f"{kernel}_unaligned"
    config = {**launch.config(name, x.device, x.dtype, block), "BLOCK_D": block}
    if "SPLIT" in config:  # within a window there are few tiles without a mask
        config["SPLIT"] = bool(config["SPLIT"]) and not window
    config["TMA"] = bool(config["TMA"]) and described
    if config["TMA"]:  # each thread has an allocator of its own, and so autograd's
        triton.set_allocator(_scratch)
    return config


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the tensor descriptors that a kernel makes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _strides(*tensors: Tensor) -> tuple[list[int], int]:
    """The rows' strides in vectors, and the elements of a vector."""
    strides = [x.stride(0) for x in tensors]
    vec = launch.vector(tensors[0].dtype, *strides)
    return [stride // vec for stride in strides], vec


def _grid(x: Tensor, cu_seqlens: Tensor, block: int, heads: int) -> tuple[int]:
    """Programs for all tiles of `block` rows, see `find_tile`, and each head."""
    return ((x.shape[0] // block + cu_seqlens.numel() - 1) * heads,)
