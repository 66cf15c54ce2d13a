"""Attention of new tokens over a cache: right, written where it should be, alone in its bits."""

import pytest
import torch
from implementations import Backend
from torch import Tensor

from lora_engine import ops
from lora_engine.testing import error

OPERATION = "attention_decode"
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}


def runs(*spans: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Slots, spans and their bounds of sequences with these runs of rows."""
    slots = torch.tensor([s[-1][0] + s[-1][1] - 1 for s in spans])
    bounds = torch.tensor([0, *(len(s) for s in spans)]).cumsum(0).to(torch.int32)
    return slots, torch.tensor([run for s in spans for run in s]), bounds


SHARED = ([(10, 70), (0, 3)], [(10, 70), (3, 1)], [(90, 1)], [(100, 65)], [(80, 4), (200, 64)])
SIZES = {"grouped": (6, 2, 64), "odd_group": (9, 3, 20), "one_head": (1, 1, 6)}


def problem(size: str, dtype: torch.dtype, spans: tuple = SHARED) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    heads, kv_heads, dim = SIZES[size]
    count = len(spans)
    q, k, v = (torch.randn(count, h * dim).to(dtype) for h in (heads, kv_heads, kv_heads))
    keys, values = (torch.randn(300, kv_heads * dim).to(dtype) for _ in range(2))
    angle = torch.rand(count, dim // 2) * 6
    cos, sin = (torch.cat([x, x], -1) for x in (angle.cos(), angle.sin()))
    return [q, k, v, keys, values, cos, sin], torch.tensor(dim)


def decode(tensors: list[Tensor], spans: tuple, dim: int, **more: object) -> tuple[Tensor, ...]:
    """The result, and the cache after it."""
    q, k, v, keys, values, cos, sin = tensors
    where = [x.to(q.device) for x in runs(*spans)]
    keys, values = keys.clone(), values.clone()
    cache = ops.CacheRows(keys, values, *where)
    out = ops.attention_decode(q, k, v, cache, head_dim=dim, cos=cos, sin=sin, **more)
    return out, keys, values


def attended(tensors: list[Tensor], spans: tuple, dim: int, window: int = 0) -> Tensor:
    """PyTorch's own attention over the same rows in float64, [S, Hq D]."""
    q, k, v, keys, values, cos, sin = (x.double() for x in tensors)

    def turned(x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (-1, dim))
        half = torch.cat((-heads[..., dim // 2 :], heads[..., : dim // 2]), -1)
        return heads * cos[:, None] + half * sin[:, None]

    dtype, rows = tensors[0].dtype, []
    queries, own = (turned(x).to(dtype).double() for x in (q, k))
    for s, one in enumerate(spans):
        at = torch.cat([torch.arange(first, first + count) for first, count in one])[-window:]
        ks, vs = keys[at].unflatten(-1, (-1, dim)), values[at].unflatten(-1, (-1, dim))
        ks[-1], vs[-1] = own[s], v[s].unflatten(-1, (-1, dim))
        parts = (queries[s][:, None], ks.transpose(0, 1), vs.transpose(0, 1))
        out = torch.nn.functional.scaled_dot_product_attention(
            *(x[None] for x in parts), enable_gqa=True
        )
        rows.append(out[0, :, 0].flatten())
    return torch.stack(rows)


@pytest.mark.reference
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("window", [0, 1, 66])
def test_matches_pytorch(backend: Backend, dtype: torch.dtype, size: str, window: int) -> None:
    tensors, dim = problem(size, dtype)
    want = attended(tensors, SHARED, int(dim), window)
    out, _, _ = decode(backend.put(*tensors), SHARED, int(dim), window=window, impl=backend.impl)
    assert error(out.cpu(), want) < TOLERANCE[dtype]


@pytest.mark.reference
def test_key_and_value_are_kept_and_nothing_else_is_written(
    backend: Backend, dtype: torch.dtype
) -> None:
    tensors, dim = problem("grouped", dtype)
    _, k, v, keys, values, cos, sin = tensors
    _, new_keys, new_values = decode(backend.put(*tensors), SHARED, int(dim), impl=backend.impl)
    slots = runs(*SHARED)[0]
    heads = k.unflatten(-1, (-1, int(dim)))
    turned = ops.rope(heads, None, cos, sin, impl="reference").flatten(1)
    assert error(new_keys.cpu()[slots], turned) < TOLERANCE[dtype]
    assert torch.equal(new_values.cpu()[slots], v)
    others = torch.ones(len(keys), dtype=torch.bool).index_fill(0, slots, False)
    assert torch.equal(new_keys.cpu()[others], keys[others])
    assert torch.equal(new_values.cpu()[others], values[others])


def test_a_sequence_has_the_same_bits_alone_and_in_other_spans(
    backend: Backend, dtype: torch.dtype
) -> None:
    tensors, dim = problem("odd_group", dtype)
    whole, keys, values = decode(backend.put(*tensors), SHARED, int(dim), impl=backend.impl)
    for s, one in enumerate(SHARED):
        q, k, v, _, _, cos, sin = (x[s : s + 1] for x in tensors)
        at = torch.cat([torch.arange(first, first + count) for first, count in one])
        moved = [torch.zeros(len(at), x.shape[1], dtype=dtype) for x in (keys, values)]
        moved[0][:], moved[1][:] = keys.cpu()[at], values.cpu()[at]
        alone, _, _ = decode(
            backend.put(q, k, v, *moved, cos, sin), ([(0, len(at))],), int(dim), impl=backend.impl
        )
        assert torch.equal(alone[0], whole[s])


def test_without_sequences_the_result_is_empty() -> None:
    cache = ops.CacheRows(
        torch.zeros(4, 8),
        torch.zeros(4, 8),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0, 2, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int32),
    )
    out = ops.attention_decode(*(torch.zeros(0, n) for n in (16, 8, 8)), cache, head_dim=8)
    assert out.shape == (0, 16)


WRONG = {
    "a span behind the cache": ([[(290, 11)]], "not in the cache's 300 rows"),
    "a span before the cache": ([[(-1, 3)]], "not in the cache's 300 rows"),
    "an empty span": ([[(5, 0), (7, 1)]], "a span is empty"),
}


@pytest.mark.parametrize("name", WRONG)
def test_spans_that_do_not_fit_are_refused(name: str) -> None:
    spans, message = WRONG[name]
    tensors, dim = problem("one_head", torch.float32, tuple(spans))
    with pytest.raises(ValueError, match=message):
        decode(tensors, tuple(spans), int(dim))


def test_a_slot_that_is_not_the_last_row_is_refused() -> None:
    (q, k, v, keys, values, *_), dim = problem("one_head", torch.float32, ([(4, 3)],))
    _, spans, bounds = runs([(4, 3)])
    cache = ops.CacheRows(keys, values, torch.tensor([5]), spans, bounds)
    with pytest.raises(ValueError, match="slot is not the last row"):
        ops.attention_decode(q, k, v, cache, head_dim=int(dim))
    with pytest.raises(ValueError, match="not whole tensors"):
        ops.attention_decode(q, k, v, cache._replace(keys=keys[:, ::2]), head_dim=int(dim))
