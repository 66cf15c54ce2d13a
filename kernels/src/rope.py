"""Rotary position embedding, one program for all heads of a few tokens."""

import triton
import triton.language as tl
from lora_engine.backends.triton import launch
from lora_engine.backends.triton.relaunch import Relaunched
from torch import Tensor


@triton.jit
def _rotated(x1, x2, cos1, cos2, sin1, sin2, INVERSE: tl.constexpr):
    if INVERSE:
        y1 = x1 * cos1 + x2 * sin2
        y2 = x2 * cos2 - x1 * sin1
    else:
        y1 = x1 * cos1 - x2 * sin1
        y2 = x2 * cos2 + x1 * sin2
    return y1, y2


@triton.jit
def _halves(
    ptr,  # [..., R] with columns one apart; a tile of pointers to the first of each row
    mask,  # rows that exist
    other,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """The first and second elements of the pairs of each row, float32."""
    if INTERLEAVED:
        offs = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        x = tl.load(ptr + offs, mask=mask & (offs < R), other=other).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], BLOCK_HALF, 2)))
    else:
        offs = tl.arange(0, BLOCK_HALF)[None, None, :]
        mask = mask & (offs < R // 2)
        x1 = tl.load(ptr + offs, mask=mask, other=other).to(tl.float32)
        x2 = tl.load(ptr + R // 2 + offs, mask=mask, other=other).to(tl.float32)
    return x1, x2


@triton.jit
def _rotate_heads(
    x_ptr,  # [tokens, heads, D]
    y_ptr,  # the same shape
    heads,
    offs_t,
    mask_t,
    stride_xt,
    stride_xh,
    stride_yt,
    stride_yh,
    cos1,
    cos2,
    sin1,
    sin2,
    D: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    element = y_ptr.dtype.element_ty
    for first in range(0, heads, BLOCK_H):
        offs_h = (first + tl.arange(0, BLOCK_H)).to(tl.int64)[None, :, None]
        mask = mask_t & (offs_h < heads)
        x_rows = x_ptr + offs_t * stride_xt + offs_h * stride_xh
        y_rows = y_ptr + offs_t * stride_yt + offs_h * stride_yh
        x1, x2 = _halves(x_rows, mask, 0.0, R, INTERLEAVED, BLOCK_HALF)
        y1, y2 = _rotated(x1, x2, cos1, cos2, sin1, sin2, INVERSE)
        y1, y2 = y1.to(element), y2.to(element)
        if INTERLEAVED:
            offs = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
            y = tl.join(y1, y2)
            y = tl.reshape(y, (y.shape[0], y.shape[1], 2 * BLOCK_HALF))
            tl.store(y_rows + offs, y, mask=mask & (offs < R))
        else:
            offs = tl.arange(0, BLOCK_HALF)[None, None, :]
            tl.store(y_rows + offs, y1, mask=mask & (offs < R // 2))
            tl.store(y_rows + R // 2 + offs, y2, mask=mask & (offs < R // 2))
        if R < D:
            offs = R + tl.arange(0, BLOCK_REST)[None, None, :]
            rest = tl.load(x_rows + offs, mask=mask & (offs < D))
            tl.store(y_rows + offs, rest, mask=mask & (offs < D))


@Relaunched
@triton.jit
def _rope_kernel(
    q_ptr,  # [tokens, heads_q, D]
    k_ptr,  # [tokens, heads_k, D]
    q_out_ptr,
    k_out_ptr,
    cos_ptr,  # [positions, R]
    sin_ptr,  # [positions, R]
    position_ptr,  # [tokens] or None
    tokens,
    positions,
    heads_q,  # not constants: unrolled, the loop over heads spills
    heads_k,
    stride_qt,  # strides in vectors of VEC elements
    stride_qh,
    stride_kt,
    stride_kh,
    stride_qot,
    stride_qoh,
    stride_kot,
    stride_koh,
    stride_cos,
    stride_sin,
    HAS_Q: tl.constexpr,
    HAS_K: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Rotates the pairs (x1, x2) of every head by its token's angle:

        y1 = x1 cos1 - x2 sin1      y2 = x2 cos2 + x1 sin2

    INVERSE applies the transposed map, which takes the gradient of y to that of x.
    """
    offs_t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    row = offs_t
    if position_ptr is not None:
        row = tl.load(position_ptr + offs_t, mask=offs_t < tokens, other=0).to(tl.int64)
    # A position outside the tables reads nothing and turns its token to NaN.
    mask_row = ((row >= 0) & (row < positions))[:, None, None]
    offs_t = offs_t[:, None, None]
    mask_t = offs_t < tokens
    # Every head's rows point at the same table row: loaded in the layout of the heads, the tables
    # need no exchange between threads.
    row = tl.broadcast_to(row[:, None, None], (BLOCK_T, BLOCK_H, 1))
    cos_rows = cos_ptr + row * (stride_cos * VEC)
    sin_rows = sin_ptr + row * (stride_sin * VEC)
    nan = float("nan")
    cos1, cos2 = _halves(cos_rows, mask_row, nan, R, INTERLEAVED, BLOCK_HALF)
    sin1, sin2 = _halves(sin_rows, mask_row, nan, R, INTERLEAVED, BLOCK_HALF)
    if HAS_Q:
        _rotate_heads(
            q_ptr,
            q_out_ptr,
            heads_q,
            offs_t,
            mask_t,
            stride_qt * VEC,
            stride_qh * VEC,
            stride_qot * VEC,
            stride_qoh * VEC,
            cos1,
            cos2,
            sin1,
            sin2,
            D,
            R,
            INTERLEAVED,
            INVERSE,
            BLOCK_HALF,
            BLOCK_REST,
            BLOCK_H,
        )
    if HAS_K:
        _rotate_heads(
            k_ptr,
            k_out_ptr,
            heads_k,
            offs_t,
            mask_t,
            stride_kt * VEC,
            stride_kh * VEC,
            stride_kot * VEC,
            stride_koh * VEC,
            cos1,
            cos2,
            sin1,
            sin2,
            D,
            R,
            INTERLEAVED,
            INVERSE,
            BLOCK_HALF,
            BLOCK_REST,
            BLOCK_H,
        )


def rope(
    q: Tensor | None,  # [tokens, q_heads, head_dim], columns one apart
    k: Tensor | None,  # [tokens, kv_heads, head_dim], columns one apart; q or k is given
    q_out: Tensor | None,  # q's shape
    k_out: Tensor | None,  # k's shape
    cos: Tensor,  # [positions, rotary_dim], columns one apart
    sin: Tensor,  # [positions, rotary_dim], columns one apart
    position_ids: Tensor | None,  # [tokens] int64 or int32
    *,
    interleaved: bool,
    inverse: bool,
) -> None:
    """Writes q_out and k_out; `inverse` is the transposed rotation, the backward pass.

    Launch size: the elements of one token's heads, of q or of k where that has more.
    """
    pairs = [(x, y) for x, y in ((q, q_out), (k, k_out)) if x is not None and y is not None]
    if not pairs or all(x.numel() == 0 for x, _ in pairs):
        return
    (x, y), (x_k, y_k) = pairs[0], pairs[-1]
    heads_q = 0 if q is None else q.shape[1]
    heads_k = 0 if k is None else k.shape[1]
    tokens, _, head_dim = x.shape
    positions, rotary = cos.shape
    config = launch.config("rope", x.device, x.dtype, max(heads_q, heads_k) * head_dim)
    strides = [s for each in (x, x_k, y, y_k) for s in each.stride()[:2]]
    strides += [cos.stride(0), sin.stride(0)]
    vec = launch.vector(x.dtype, *strides)
    _rope_kernel[(launch.cdiv(tokens, config["BLOCK_T"]),)](
        x,
        x_k,
        y,
        y_k,
        cos,
        sin,
        None if position_ids is None else position_ids.contiguous(),
        tokens,
        positions,
        heads_q,
        heads_k,
        *(stride // vec for stride in strides),
        HAS_Q=heads_q > 0,
        HAS_K=heads_k > 0,
        D=head_dim,
        R=rotary,
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        VEC=vec,
        BLOCK_HALF=launch.next_power_of_2(rotary // 2),
        BLOCK_REST=launch.next_power_of_2(max(head_dim - rotary, 1)),
        **config,
    )
