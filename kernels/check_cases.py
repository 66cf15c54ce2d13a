"""The launches that check.py compiles: one function for each operation.

A function gets a dtype and yields calls of its launchers, with tensors that have no memory. They
must reach every line of launch_table.json, every flag that makes another kernel, and one shape
whose strides are not multiples of 16, where Triton cannot assume aligned rows. `matrix` names the
kernels that must use the best matrix instructions of the capability (wgmma, tcgen05), `any_matrix`
those whose tiles are too small for them.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ROWS = 8192
# Widths of models from 135M to 405B parameters, hidden and intermediate, and an unaligned one.
COLS = (64, 576, 1001, 1536, 4096, 8192, 14336, 28672)
# Bytes of the widest rows that the norms' kernels hold without spills, 16384 in float32.
WIDEST_NORM = 65536
VOCABS = (1001, 32000, 49152, 50257, 128256, 151936, 262144)
# (head_dim, query heads, key heads, padding columns): aligned, padded to a power of two, unaligned.
ATTENTION_HEADS = (
    (16, 4, 2, 0),
    (64, 9, 3, 1),
    (64, 32, 8, 48),
    (80, 8, 8, 0),
    (256, 16, 8, 0),
    (128, 32, 8, 48),
)
# The last is what --quick takes where the dtype makes no other line of the table.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Call:
    """A launcher, its arguments, and what its kernels must show."""

    launcher: Callable[..., object]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    matrix: tuple[str, ...] = ()
    any_matrix: tuple[str, ...] = ()

    def __str__(self) -> str:
        arguments = [*self.args, *(f"{k}={_text(v)}" for k, v in self.kwargs.items())]
        return f"{self.launcher.__name__}({', '.join(map(_text, arguments))})"


Cases = Callable[[torch.dtype], Iterator[Call]]
OPERATIONS: dict[str, Cases] = {}


def operation(cases: Cases) -> Cases:
    """Register an operation's calls under its name."""
    OPERATIONS[cases.__name__] = cases
    return cases


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor of this shape without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def call(
    launcher: Callable[..., object],
    *args: Any,
    matrix: tuple[str, ...] = (),
    any_matrix: tuple[str, ...] = (),
    **kwargs: Any,
) -> Call:
    """A call with arguments written as they are in a call."""
    return Call(launcher, args, kwargs, matrix, any_matrix)


def sizes(*kernels: str, among: tuple[int, ...] = COLS) -> list[int]:
    """`among`, and launch sizes that reach every other line of the kernels' tables."""
    table = importlib.import_module("lora_engine.backends.tables").launch_table()
    lines = [line for k in kernels for by in table[k].values() for x in by.values() for line in x]
    limits = {limit for limit, _ in lines if limit is not None}
    beyond = {2 * max(limits)} if limits and max(limits) >= max(among) else set()
    return sorted({*among, *limits, *beyond})


def _text(value: Any) -> str:
    if not isinstance(value, Tensor):
        return str(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


@operation
def glu(dtype: torch.dtype) -> Iterator[Call]:
    from lora_engine.backends.triton import glu

    for cols in sizes("glu_fwd", "glu_bwd"):
        x = empty(ROWS, cols, dtype=dtype)
        for activation in ("silu", "gelu", "gelu_tanh"):
            yield call(glu.glu_fwd, x, x, x, activation=activation)
            yield call(glu.glu_bwd, x, x, x, x, x, activation=activation)
            yield call(glu.glu_bwd, x, x, x, x, x, x, activation=activation)


@operation
def rope(dtype: torch.dtype) -> Iterator[Call]:
    from lora_engine.backends.triton import rope

    positions = empty(ROWS, dtype=torch.int64)
    for heads, kv_heads, dim, rotary in ((9, 3, 64, 64), (32, 8, 128, 128), (16, 16, 80, 32)):
        q, k = (empty(ROWS, n, dim, dtype=dtype) for n in (heads, kv_heads))
        q_out, k_out = (torch.empty_like(x) for x in (q, k))
        cos = empty(ROWS, rotary, dtype=torch.float32)
        for inverse in (False, True):
            for interleaved in (False, True):
                flags = {"interleaved": interleaved, "inverse": inverse}
                yield call(rope.rope, q, k, q_out, k_out, cos, cos, None, **flags)
                yield call(rope.rope, q, None, q_out, None, cos, cos, positions, **flags)


@operation
def attention_decode(dtype: torch.dtype) -> Iterator[Call]:
    """Heads of every line, odd groups, with rotation and without, with a window."""
    from lora_engine.backends.triton import attention_decode as triton

    where = (empty(4, dtype=torch.int64), empty(6, 2, dtype=torch.int64))
    bounds = empty(5, dtype=torch.int32)
    for dim, heads, kv_heads in ((64, 9, 3), (80, 8, 8), (128, 32, 8), (256, 8, 4)):
        q, k = (empty(4, n * dim, dtype=dtype) for n in (heads, kv_heads))
        cache, cos = empty(512, kv_heads * dim, dtype=dtype), empty(4, dim, dtype=torch.float32)
        for turn, window in ((cos, 0), (None, 100)):
            yield call(
                triton.attention_decode,
                *(q, k, k, turn, turn, cache, cache, *where, bounds, q),
                head_dim=dim,
                scale=0.1,
                window=window,
                any_matrix=("_attention_decode_kernel",),
            )


@operation
def attention(dtype: torch.dtype) -> Iterator[Call]:
    """Causal and not, with a window and parents; heads of every line, padded, unaligned."""
    from lora_engine.backends.triton import attention

    bounds, parents = empty(5, dtype=torch.int32), empty(4, dtype=torch.int32)
    kinds: tuple[dict[str, Any], ...] = (
        {"causal": True, "window": 0},
        {"causal": False, "window": 0},
        {"causal": True, "window": 512, "parents": parents},
    )
    for dim, heads, kv_heads, padding in ATTENTION_HEADS:
        if dtype == torch.float32 and dim > 128:
            continue
        widths = [heads * dim, kv_heads * dim, kv_heads * dim]
        q, k, v, _ = empty(ROWS, sum(widths) + padding, dtype=dtype).split((*widths, padding), 1)
        o, lse = empty(ROWS, widths[0], dtype=dtype), empty(heads, ROWS, dtype=torch.float32)
        table = empty(ROWS, dim, dtype=torch.float32)
        # Tiles of wide, unaligned and float32 heads are small.
        native = dtype != torch.float32 and dim <= 128 and padding % 8 == 0
        for kind in kinds:
            cos = None if kind["window"] else table
            options = {"head_dim": dim, "scale": dim**-0.5, **kind}
            forward = (attention.attention_fwd, q, k, v, bounds, cos, cos, o, lse)
            backward = (attention.attention_bwd, o, q, k, v, bounds, cos, cos, o, lse, q, k, v)
            for given, kernels in (
                (forward, ("_attention_fwd_kernel",)),
                (backward, ("_attention_bwd_dq_kernel", "_attention_bwd_dkv_kernel")),
            ):
                matrix = {"matrix" if native else "any_matrix": kernels}
                yield call(*given, **options, **matrix)


@operation
def rms_norm(dtype: torch.dtype) -> Iterator[Call]:
    from lora_engine.backends.triton import rms_norm

    for cols in sizes("rms_norm_fwd", "rms_norm_bwd", "rms_norm_bwd_dw"):
        if cols * dtype.itemsize > WIDEST_NORM:
            continue
        x = empty(ROWS, cols, dtype=dtype)
        weight, rstd = empty(cols, dtype=dtype), empty(ROWS, dtype=torch.float32)
        dweight = empty(cols, dtype=torch.float32)
        yield call(rms_norm.rms_norm_fwd, x, None, weight, x, x, rstd, 1e-5, 0.0)
        for other in (None, x):
            yield call(rms_norm.rms_norm_fwd, x, other, weight, x, other, rstd, 1e-5, 0.0)
            for dw in (None, dweight):
                yield call(rms_norm.rms_norm_bwd, x, other, x, weight, rstd, x, dw, 0.0)
    for cols, heads in ((64, 14), (128, 32)):
        x = empty(ROWS, heads + 4, cols, dtype=dtype)[:, :heads]
        weight, rstd = empty(cols, dtype=dtype), empty(ROWS * heads, dtype=torch.float32)
        yield call(rms_norm.rms_norm_fwd, x, None, weight, x, None, rstd, 1e-5, 0.0)
        for dw in (None, empty(cols, dtype=torch.float32)):
            yield call(rms_norm.rms_norm_bwd, x, None, x, weight, rstd, x, dw, 0.0)


@operation
def layer_norm(dtype: torch.dtype) -> Iterator[Call]:
    from lora_engine.backends.triton import layer_norm

    for cols in sizes("layer_norm_fwd", "layer_norm_bwd", "layer_norm_bwd_dw"):
        if cols * dtype.itemsize > WIDEST_NORM:
            continue
        x = empty(ROWS, cols, dtype=dtype)
        weight, mean = empty(cols, dtype=dtype), empty(ROWS, dtype=torch.float32)
        total = empty(cols, dtype=torch.float32)
        for w, b in ((weight, weight), (weight, None), (None, None)):
            yield call(layer_norm.layer_norm_fwd, x, w, b, x, mean, mean, 1e-5)
        for w, dw, db in ((weight, None, None), (weight, total, total), (None, None, None)):
            yield call(layer_norm.layer_norm_bwd, x, x, w, mean, mean, x, dw, db)


@operation
def cross_entropy(dtype: torch.dtype) -> Iterator[Call]:
    from lora_engine.backends.triton import cross_entropy

    rows = 2048
    row, target = empty(rows, dtype=torch.float32), empty(rows, dtype=torch.int64)
    correct = empty(rows, dtype=torch.bool)
    plain: dict[str, Any] = {"ignore_index": -100}
    options = {**plain, "label_smoothing": 0.1, "softcap": 30.0, "z_loss": 1e-4}
    for cols in sizes("cross_entropy", "cross_entropy_unaligned", among=VOCABS):
        z = empty(rows, cols, dtype=dtype)
        forward = (cross_entropy.cross_entropy, z, target, row, row, correct)
        for given in (plain, options):
            yield call(*forward, **given)
            yield call(*forward, lse=row, entropy=row, **given)
            yield call(*forward, grad=z, **given)
            yield call(cross_entropy.cross_entropy_bwd, z, target, row, row, z, **given)


@operation
def adamw(dtype: torch.dtype) -> Iterator[Call]:
    """float32 whatever the dtype, so once is enough."""
    from lora_engine.backends.triton import adamw, adamw_8bit

    from lora_engine.values import AdamWHyper

    if dtype != torch.float32:
        return
    norm = empty(dtype=dtype)
    hyper = AdamWHyper(
        lr=1e-4,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        weight_decay=0.01,
        bias_correction1=0.1,
        bias_correction2=0.001,
    )
    for count in (1000, 2**20, 2**31 + 256):
        flat, codes = empty(count, dtype=dtype), empty(count, dtype=torch.uint8)
        scales = empty(-(-count // 256), dtype=dtype)
        yield call(adamw.grad_norm, flat, norm)
        for clip in (None, norm):
            numbers = hyper if clip is None else hyper._replace(max_grad_norm=1.0)
            yield call(adamw.adamw, flat, flat, flat, flat, numbers, clip)
            moments = (codes, codes, scales, scales)
            yield call(adamw_8bit.adamw_8bit, flat, flat, *moments, numbers, clip)


@operation
def blockwise_4bit(dtype: torch.dtype) -> Iterator[Call]:
    from lora_engine.backends.triton import blockwise_4bit

    from lora_engine.quantization.format import BlockScales

    def flat(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return empty(size, dtype=dtype)

    table, values, ascending = flat(256), flat(16), flat(16, torch.uint8)
    for cols in sizes("dequantize_4bit"):
        codes, blocks = flat(ROWS * cols // 2, torch.uint8), ROWS * cols // 64
        nested = flat(blocks, torch.uint8), flat(-(-blocks // 256)), table, empty(dtype=table.dtype)
        w = empty(ROWS, cols + 16, dtype=dtype)[:, :cols]
        for scales in (BlockScales(flat(blocks)), BlockScales(*nested)):
            yield call(blockwise_4bit.dequantize_4bit, codes, scales, values, w, 0, 64)
    for rows, cols in ((1, 1), (3, 8)):  # sizes of one, for which Triton makes kernels of their own
        w, plain = empty(rows, cols, dtype=dtype), BlockScales(flat(1))
        codes = flat(-(-rows * cols // 2), torch.uint8)
        yield call(blockwise_4bit.dequantize_4bit, codes, plain, values, w, 0, 32)
        yield call(blockwise_4bit.quantize_4bit, w, flat(15), ascending, codes, flat(1), 32)
    for rows in (1001, ROWS):  # an odd number of values, and a multiple of all blocks
        w = empty(rows, rows, dtype=dtype)
        codes = flat(-(-w.numel() // 2), torch.uint8)
        for block in sizes("quantize_4bit", among=(32, 64, 128, 256, 512, 1024, 2048, 4096)):
            absmax = flat(-(-w.numel() // block))
            yield call(blockwise_4bit.quantize_4bit, w, flat(15), ascending, codes, absmax, block)


@operation
def lora_linear(dtype: torch.dtype) -> Iterator[Call]:
    """A group of three linears, aligned and not, with few ranks and many, masked and not."""
    from lora_engine.backends.triton import lora_linear as lora

    from lora_engine.backends.lora_parts import AdapterPart, Placing, ScaledColumns, ScaledRows
    from lora_engine.values import Dropout, LoraFactors

    dropout = Dropout(0.1, 2**40 + 5)
    tall = ((16, 0, ROWS), (64, 0, 512), (3, 1, ROWS), (256, 0, ROWS))
    for r, pad, rows in (*tall, (16, 0, 512), (16, 0, 64), (16, 0, 16)):
        n, k, ranks = 6144, 4096, 3 * r + pad
        outs = (slice(0, 4096), slice(4096, 5120), slice(5120, n))
        spans = [(out, slice(i * r, (i + 1) * r)) for i, out in enumerate(outs)]
        x = empty(rows, k + ranks, dtype=dtype)[:, :k]
        dy = empty(rows, n + ranks, dtype=dtype)[:, :n]
        whole = empty(n + ranks, k + ranks, dtype=dtype)
        weight, lora_a, lora_b = whole[:n, :k], whole[n:, :k], whole[:n, k:]
        s, dx = empty(rows, ranks, dtype=dtype), empty(rows, k, dtype=dtype)
        d_lora_a = empty(ranks, k, dtype=torch.float32)
        d_lora_b = empty(n * r, dtype=torch.float32)
        parts = [AdapterPart(*span, 2.0) for span in spans]
        placings = []
        for out, columns in spans:
            a, b = empty(r, k, dtype=torch.float32), empty(out.stop - out.start, r, dtype=dtype)
            placings.append(Placing(LoraFactors(a, b, 2.0), lora_a[columns], lora_b[out, columns]))
        yield call(lora.place_factors, lora_a, lora_b, placings)
        y, bias = empty(rows, n, dtype=dtype), empty(n, dtype=dtype)
        # float32 is multiplied exactly, without matrix instructions.
        wide = dtype != torch.float32 and pad == 0
        for mask in (None, dropout):
            for copy in (None, s):
                yield call(lora.lora_a_fwd, x, lora_a, s, spans, mask, copy)
            for columns_scaled in (None, ScaledColumns(empty(k, dtype=dtype), 1.0)):
                yield call(lora.lora_a_bwd, s, x, d_lora_a, spans, mask, columns_scaled)
            expected = ("_two_segment_kernel",) if wide else ()
            yield call(lora.lora_linear_dx, dy, weight, s, lora_a, dx, spans, mask, matrix=expected)
        rows_scaled = ScaledRows(empty(rows, dtype=torch.float32), s)
        for grad in (None, d_lora_b):
            yield call(lora.lora_b_bwd, dy, lora_b, s, s, grad, spans, parts, rows_scaled)
        # Tiles of 16 rows are too small for the best ones.
        instructions = "any_matrix" if rows <= 16 else "matrix"
        for addend in (None, bias):
            expected = {instructions: ("_two_segment_kernel",) if wide else ()}
            yield call(lora.lora_linear_fwd, x, weight, s, lora_b, y, addend, **expected)


@operation
def glu_lora(dtype: torch.dtype) -> Iterator[Call]:
    """Between adapted linears, and with adapters on some of them alone."""
    from lora_engine.backends.triton import glu_lora

    from lora_engine.backends.lora_parts import AdapterPart, DyGradients, XGradient

    rank, cols = 16, 14336
    for gate_rank, up_rank, outer_rank in ((16, 16, 16), (8, 8, 8), (16, 0, 16), (0, 16, 0)):
        ranks = 2 * rank
        gate, up = empty(ROWS, 2 * cols, dtype=dtype).split([cols, cols], dim=1)
        dgate, dup, ds = empty(ROWS, 2 * cols + ranks, dtype=dtype).split([cols, cols, ranks], 1)
        columns = slice(0, gate_rank), slice(gate_rank, gate_rank + up_rank)
        spans = list(zip((slice(0, cols), slice(cols, 2 * cols)), columns, strict=True))
        outer_spans = [(slice(0, 4096), slice(0, outer_rank))]
        y, s = empty(ROWS, cols + rank, dtype=dtype).split([cols, rank], dim=1)
        lora_a = empty(4096 + rank, cols + rank, dtype=dtype)[4096:, :cols]
        lora_b = empty(2 * cols + ranks, 4096 + ranks, dtype=dtype)[: 2 * cols, 4096:]
        dy, outer_ds = (
            empty(ROWS, cols, dtype=dtype),
            empty(ROWS, 4096 + rank, dtype=dtype)[:, :rank],
        )
        for activation in ("silu", "gelu", "gelu_tanh"):
            if outer_rank:
                forward = gate, up, y, lora_a, s, outer_spans
                for copy in (None, s):
                    yield call(glu_lora.glu_lora_fwd, *forward, copy, activation=activation)
            outer = None
            if outer_rank:
                d_a = empty(rank, cols, dtype=torch.float32)
                outer = XGradient(outer_ds, d_a, outer_spans)
            parts = [AdapterPart(*span, 2.0) for span in spans]
            size_of_b = cols * (gate_rank + up_rank)
            for d_b in (None, empty(size_of_b, dtype=torch.float32)):
                inner_s = empty(ROWS, ranks, dtype=dtype)
                inner = DyGradients(lora_b, inner_s, ds, d_b, spans, parts)
                backward = dy, gate, up, dgate, dup, inner, outer
                yield call(glu_lora.glu_lora_bwd, *backward, activation=activation)
