"""Attention of new tokens over a cache of keys and values, without gradients."""

from typing import NamedTuple

import torch
from torch import Tensor

from lora_engine import backends, reference
from lora_engine.backends import launchers
from lora_engine.ops.tensors import accumulate_dtype, as_rows, check, shape_of


class CacheRows(NamedTuple):
    """A cache of keys and values, and which of its rows each of S sequences sees.

    A span is a run of rows. A sequence's keys are the rows of its spans in their order. Spans may
    overlap, and a token may see the new tokens of others: so several tokens of one text are as many
    sequences.
    """

    keys: Tensor  # [slots, Hkv D]
    values: Tensor  # [slots, Hkv D]
    slots: Tensor  # [S] int64: the row of each sequence's new token, the last of its last span
    spans: Tensor  # [P, 2] int64: first row, number of rows (at least one)
    cu_spans: Tensor  # [S + 1] int32: sequence s has spans cu_spans[s] to cu_spans[s + 1]


def attention_decode(
    q: Tensor,  # [S, Hq D]
    k: Tensor,  # [S, Hkv D]
    v: Tensor,  # [S, Hkv D]
    cache: CacheRows,
    *,
    head_dim: int,
    cos: Tensor | None = None,  # [S, D]
    sin: Tensor | None = None,  # [S, D]
    softmax_scale: float | None = None,
    window: int = 0,
    impl: str | None = None,
) -> Tensor:
    """`softmax(scale q Kᵀ) V` of one new token of each sequence, [S, Hq D] in q's dtype.

    Writes k, rotated with cos and sin like q, and v into the cache's rows `slots`. K and V are the
    rows that `cache` says, of which query head h reads key/value head `h // (Hq / Hkv)`; with
    `window` > 0 the last so many. `softmax_scale` defaults to D^-1/2. A sequence's result depends
    on its own rows alone, to the bit, not on the others or on how its rows lie in spans.

    Raises ValueError where shapes or dtypes do not fit, or, on the CPU, where a span does not lie
    in the cache or a sequence's last row is not its slot.
    """
    q, k, v = as_rows(q), as_rows(k), as_rows(v)
    _check(q, k, v, cache, head_dim, cos, sin)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    impl = backends.select("attention_decode", q.device, q.dtype, impl)
    if impl == "reference":
        qs, ks, vs, keys, values = (
            x.unflatten(-1, (-1, head_dim)) for x in (q, k, v, cache.keys, cache.values)
        )
        return reference.attention_decode(
            qs,
            ks,
            vs,
            keys,
            values,
            cache.slots,
            cache.spans,
            cache.cu_spans,
            cos=cos,
            sin=sin,
            softmax_scale=scale,
            window=window,
        ).flatten(1)
    accumulate = accumulate_dtype(q.dtype)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launchers.attention_decode(impl).attention_decode(
        q,
        k,
        v,
        None if cos is None else cos.to(accumulate).contiguous(),
        None if sin is None else sin.to(accumulate).contiguous(),
        keys=cache.keys,
        values=cache.values,
        slots=cache.slots,
        spans=cache.spans,
        cu_spans=cache.cu_spans,
        o=o,
        head_dim=head_dim,
        scale=scale,
        window=window,
    )
    return o


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: CacheRows,
    head_dim: int,
    cos: Tensor | None,
    sin: Tensor | None,
) -> None:
    shapes = f"q {shape_of(q)}, k {shape_of(k)}, v {shape_of(v)}"
    sequences = q.shape[0]
    check(
        head_dim > 0 and head_dim % 2 == 0 and q.shape[1] % head_dim == k.shape[1] % head_dim == 0,
        f"attention_decode: head size {head_dim} is odd or does not divide: {shapes}",
    )
    check(
        k.shape == v.shape and k.shape[0] == sequences and q.dtype == k.dtype == v.dtype,
        f"attention_decode: rows or dtypes differ, or k and v: {shapes}",
    )
    check(
        k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0,
        f"attention_decode: heads of q are no multiple of those of k: {shapes}",
    )
    keys, values = cache.keys, cache.values
    check(
        keys.dim() == 2
        and keys.shape == values.shape
        and keys.shape[1] == k.shape[1]
        and keys.dtype == values.dtype == k.dtype
        and keys.is_contiguous()
        and values.is_contiguous(),
        f"attention_decode: keys {shape_of(keys)} and values {shape_of(values)} of the cache are "
        f"not whole tensors [slots, {k.shape[1]}] like k {shape_of(k)}",
    )
    check((cos is None) == (sin is None), "attention_decode: give both cos and sin, or neither")
    if cos is not None and sin is not None:
        check(
            cos.shape == sin.shape == (sequences, head_dim),
            f"attention_decode: cos {shape_of(cos)}, sin {shape_of(sin)}: expected "
            f"{[sequences, head_dim]}",
        )
    slots, spans, cu_spans = cache.slots, cache.spans, cache.cu_spans
    check(
        slots.shape == (sequences,)
        and slots.dtype == spans.dtype == torch.int64
        and spans.dim() == 2
        and spans.shape[1] == 2
        and cu_spans.shape == (sequences + 1,)
        and cu_spans.dtype == torch.int32
        and slots.is_contiguous()
        and spans.is_contiguous()
        and cu_spans.is_contiguous(),
        f"attention_decode: slots {shape_of(slots)} is not [{sequences}] int64, spans "
        f"{shape_of(spans)} not [P, 2] int64 or cu_spans {shape_of(cu_spans)} not "
        f"[{sequences + 1}] int32",
    )
    if sequences and backends.reads_at_once(spans):
        _check_rows(cache)


def _check_rows(cache: CacheRows) -> None:
    """ValueError unless spans lie in the cache and each sequence's last row is its slot."""
    first, count = cache.spans.unbind(1)
    ends = first + count
    check(
        bool((first >= 0).all() and (count > 0).all() and (ends <= cache.keys.shape[0]).all()),
        f"attention_decode: a span is empty or not in the cache's {cache.keys.shape[0]} rows",
    )
    bounds = cache.cu_spans
    check(
        int(bounds[0]) == 0
        and int(bounds[-1]) == len(cache.spans)
        and bool((bounds[1:] > bounds[:-1]).all()),
        f"attention_decode: cu_spans must rise from 0 to {len(cache.spans)}",
    )
    check(
        bool((ends[(bounds[1:] - 1).long()] - 1 == cache.slots).all()),
        "attention_decode: a sequence's slot is not the last row of its spans",
    )
