"""Attention of one new token of each sequence over the rows of a cache.

Keys are taken by their place in the sequence, a tile at a time, whatever spans they lie in: so a
sequence's bits do not depend on where its rows are, or on other sequences.
"""

import triton
import triton.language as tl
from lora_engine.backends.triton import launch
from lora_engine.backends.triton.relaunch import Relaunched
from torch import Tensor

LOG2_E = 1.4426950408889634
# tl.dot takes no smaller side.
LEAST_SIDE = 16


@triton.jit
def _rotated(row, columns, mask, cos_ptr, sin_ptr, D: tl.constexpr):
    """Elements `columns` of the heads that `row` points to, rotated: x cos + (-x2, x1) sin."""
    first = columns < D // 2
    x = tl.load(row + columns, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(row + tl.where(first, columns + D // 2, columns - D // 2), mask=mask, other=0.0)
    cos = tl.load(cos_ptr + columns, mask=columns < D, other=0.0)
    sin = tl.load(sin_ptr + columns, mask=columns < D, other=0.0)
    return x * cos + tl.where(first, -sin, sin) * other.to(tl.float32)


@Relaunched
@triton.jit
def _keep_kernel(
    k_ptr,  # [sequences, kv_heads D]
    v_ptr,  # [sequences, kv_heads D]
    cos_ptr,  # [sequences, D] or None
    sin_ptr,
    keys_ptr,  # [slots, kv_heads D]
    values_ptr,
    slots_ptr,  # [sequences]
    stride_k,
    stride_v,
    stride_cache,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A key/value head of a sequence's new token into its row of the cache:

    keys[slot] = k cos + (-k2, k1) sin      values[slot] = v
    """
    s, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, BLOCK_D)
    mask = columns < D
    k_row = k_ptr + s * stride_k + head * D
    k = tl.load(k_row + columns, mask=mask)
    if cos_ptr is not None:
        turned = _rotated(k_row, columns, mask, cos_ptr + s * D, sin_ptr + s * D, D)
        k = turned.to(k.dtype)
    v = tl.load(v_ptr + s * stride_v + head * D + columns, mask=mask)
    to = tl.load(slots_ptr + s) * stride_cache + head * D + columns
    tl.store(keys_ptr + to, k, mask=mask)
    tl.store(values_ptr + to, v, mask=mask)


@Relaunched
@triton.jit
def _attention_decode_kernel(
    q_ptr,  # [sequences, q_heads D]
    cos_ptr,  # [sequences, D] or None
    sin_ptr,
    keys_ptr,  # [slots, kv_heads D]
    values_ptr,
    spans_ptr,  # [P, 2]
    cu_spans_ptr,  # [sequences + 1]
    o_ptr,  # [sequences, q_heads D]
    stride_q,
    stride_o,
    stride_cache,
    window,
    scale,  # of the scores, in units of log 2
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The query heads of a sequence that read one key/value head: o = softmax(scale q Kᵀ) V."""
    s, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first_span, last_span = tl.load(cu_spans_ptr + s), tl.load(cu_spans_ptr + s + 1)
    keys = tl.zeros([], tl.int64)
    for span in range(first_span, last_span):
        keys += tl.load(spans_ptr + 2 * span + 1)
    begin = tl.zeros([], tl.int64)
    if window > 0:
        begin = tl.maximum(keys - window, 0)

    heads, columns = tl.arange(0, BLOCK_G)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask_q = (heads < GROUP) & (columns < D)
    q_rows = q_ptr + s * stride_q + (head * GROUP + heads) * D
    q = tl.load(q_rows + columns, mask=mask_q, other=0.0)
    if cos_ptr is not None:
        q = _rotated(q_rows, columns, mask_q, cos_ptr + s * D, sin_ptr + s * D, D).to(q.dtype)

    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    o = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    mask_d = columns < D
    for tile in range(begin, keys, BLOCK_N):
        place = tile + tl.arange(0, BLOCK_N)
        row = tl.zeros([BLOCK_N], tl.int64)
        passed = tl.zeros([], tl.int64)
        for span in range(first_span, last_span):
            first, count = tl.load(spans_ptr + 2 * span), tl.load(spans_ptr + 2 * span + 1)
            inside = (place >= passed) & (place < passed + count)
            row = tl.where(inside, first + place - passed, row)
            passed += count
        exists = place < keys
        at = row[:, None] * stride_cache + head * D + columns
        mask = exists[:, None] & mask_d
        k = tl.load(keys_ptr + at, mask=mask, other=0.0)
        v = tl.load(values_ptr + at, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
        scores = tl.where(exists[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        shrunk = tl.exp2(top - higher)
        total = total * shrunk + tl.sum(weights, axis=1)
        o = o * shrunk[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="tf32x3")
        top = higher
    o_rows = o_ptr + s * stride_o + (head * GROUP + heads) * D
    tl.store(o_rows + columns, (o / total[:, None]).to(o_ptr.dtype.element_ty), mask=mask_q)


def attention_decode(
    q: Tensor,  # [sequences, q_heads head_dim]
    k: Tensor,  # [sequences, kv_heads head_dim]
    v: Tensor,  # [sequences, kv_heads head_dim]
    cos: Tensor | None,  # [sequences, head_dim] float32
    sin: Tensor | None,  # [sequences, head_dim] float32
    keys: Tensor,  # [slots, kv_heads head_dim]
    values: Tensor,  # [slots, kv_heads head_dim]
    slots: Tensor,  # [sequences] int64
    spans: Tensor,  # [P, 2] int64: a span's first row of the cache, and how many
    cu_spans: Tensor,  # [sequences + 1] int32
    o: Tensor,  # [sequences, q_heads head_dim]
    *,
    head_dim: int,
    scale: float,
    window: int,
) -> None:
    """Writes o, and k (rotated) and v into the cache's rows `slots`.

    All rows are written before any is read: a token may see another's. Launch size: head_dim.
    """
    sequences, kv_heads = q.shape[0], k.shape[1] // head_dim
    if sequences == 0:
        return
    group = q.shape[1] // k.shape[1]
    block_d = max(launch.next_power_of_2(head_dim), LEAST_SIDE)
    config = launch.config("attention_decode", q.device, q.dtype, head_dim)
    _keep_kernel[(sequences, kv_heads)](
        k,
        v,
        cos,
        sin,
        keys,
        values,
        slots,
        k.stride(0),
        v.stride(0),
        keys.stride(0),
        D=head_dim,
        BLOCK_D=block_d,
        num_warps=1,
    )
    _attention_decode_kernel[(sequences, kv_heads)](
        q,
        cos,
        sin,
        keys,
        values,
        spans,
        cu_spans,
        o,
        q.stride(0),
        o.stride(0),
        keys.stride(0),
        window,
        scale * LOG2_E,
        GROUP=group,
        D=head_dim,
        BLOCK_G=max(launch.next_power_of_2(group), LEAST_SIDE),
        BLOCK_D=block_d,
        **config,
    )
