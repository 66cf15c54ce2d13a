"""The benchmark's cases, one per operation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.measure import Matmul, linear_matmuls
from benchmarks.common.registry import EPS, Function, Problem, Size, Work, case
from lora_engine import backends, ops, reference
from lora_engine.quantization.blockwise_4bit import code_values
from lora_engine.quantization.nested_absmax import dequantize_absmax
from lora_engine.testing import cu_seqlens
from lora_engine.values import AdaptedLinear

SCALING = 2.0
BETAS = (0.9, 0.999)
MAX_GRAD_NORM = 1.0
ADAMW: dict[str, Any] = {"lr": 1e-4, "eps": 1e-8, "weight_decay": 0.01}


def _normal(
    *shape: int, dtype: torch.dtype, device: torch.device, grad: bool = True, std: float = 1.0
) -> Tensor:
    return (std * torch.randn(shape, device=device)).to(dtype).requires_grad_(grad)


@case
def rms_norm(size: Size, dtype: torch.dtype, device: torch.device) -> Problem:
    """With the residual addition; the weight is frozen.

    Forward reads x and the residual and writes h and y; backward reads both gradients and h and
    writes one gradient.
    """
    hidden = size.model.hidden
    x, residual = (_normal(size.tokens, hidden, dtype=dtype, device=device) for _ in range(2))
    weight = _normal(hidden, dtype=dtype, device=device, grad=False)

    def eager(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        h = x + residual
        return F.rms_norm(h, (hidden,), weight, EPS), h

    return Problem(
        (x, residual, weight),
        ours=lambda x, r, w: ops.rms_norm(x, w, EPS, residual=r),
        eager=eager,
        oracle=lambda x, r, w: reference.rms_norm(x, w, EPS, residual=r),
        forward=Work(4 * x.nbytes, arithmetic=6 / (4 * x.itemsize)),
        both=Work(8 * x.nbytes, arithmetic=16 / (8 * x.itemsize)),
    )


@case
def layer_norm(size: Size, dtype: torch.dtype, device: torch.device) -> Problem:
    """Forward reads x and writes y; backward reads dy and x and writes dx (parameters frozen)."""
    hidden = size.model.hidden
    x = _normal(size.tokens, hidden, dtype=dtype, device=device)
    weight, bias = (_normal(hidden, dtype=dtype, device=device, grad=False) for _ in range(2))
    return Problem(
        (x, weight, bias),
        ours=lambda x, w, b: ops.layer_norm(x, w, b, EPS),
        eager=lambda x, w, b: F.layer_norm(x, (hidden,), w, b, EPS),
        oracle=lambda x, w, b: reference.layer_norm(x, w, b, EPS),
        forward=Work(2 * x.nbytes, arithmetic=8 / (2 * x.itemsize)),
        both=Work(5 * x.nbytes, arithmetic=20 / (5 * x.itemsize)),
    )


@case
def rope(size: Size, dtype: torch.dtype, device: torch.device) -> Problem:
    """Queries and keys in one call; forward and backward read and write them once each."""
    heads, kv_heads, dim = size.model.heads, size.model.kv_heads, size.model.head_dim
    q = _normal(size.tokens, heads, dim, dtype=dtype, device=device)
    k = _normal(size.tokens, kv_heads, dim, dtype=dtype, device=device)
    half = _normal(size.tokens, dim // 2, dtype=torch.float32, device=device, grad=False)
    angles = torch.cat((half, half), dim=-1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)

    def eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos[:, None], sin[:, None]
        return q * cos + turned(q) * sin, k * cos + turned(k) * sin

    heads_bytes, tables = q.nbytes + k.nbytes, cos.nbytes + sin.nbytes
    return Problem(
        (q, k, cos, sin),
        ours=ops.rope,
        eager=eager,
        oracle=reference.rope,
        forward=Work(2 * heads_bytes + tables, arithmetic=3 / (2 * q.itemsize)),
        both=Work(4 * heads_bytes + 2 * tables, arithmetic=3 / (2 * q.itemsize)),
    )


def _glu(
    activation: str,
    act: Callable[[Tensor], Tensor],
    size: Size,
    dtype: torch.dtype,
    device: torch.device,
) -> Problem:
    """Forward reads gate, up, writes h; backward reads dh, gate, up and writes dgate, dup."""
    shape = (size.tokens, size.model.intermediate)
    gate, up = (_normal(*shape, dtype=dtype, device=device) for _ in range(2))
    return Problem(
        (gate, up),
        ours=lambda gate, up: ops.glu(gate, up, activation=activation),
        eager=lambda gate, up: act(gate) * up,
        oracle=lambda gate, up: reference.glu(gate, up, activation=activation),
        forward=Work(3 * gate.nbytes, arithmetic=5 / (3 * gate.itemsize)),
        both=Work(8 * gate.nbytes, arithmetic=15 / (8 * gate.itemsize)),
        operation="glu",
    )


@case
def glu(size: Size, dtype: torch.dtype, device: torch.device) -> Problem:
    """SwiGLU."""
    return _glu("silu", F.silu, size, dtype, device)


@case
def geglu(size: Size, dtype: torch.dtype, device: torch.device) -> Problem:
    """GeGLU as in Gemma: the GELU by tanh."""
    return _glu("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"), size, dtype, device)


@case
def geglu_erf(size: Size, dtype: torch.dtype, device: torch.device) -> Problem:
    """GeGLU with the exact GELU."""
    return _glu("gelu", F.gelu, size, dtype, device)


@case
def cross_entropy(size: Size, dtype: torch.dtype, device: torch.device) -> Problem:
    """The mean. Forward reads the logits; the backward pass also writes their gradient."""
    logits = _normal(size.targets, size.model.vocab, dtype=dtype, device=device)
    target = torch.randint(size.model.vocab, (size.targets,), device=device)
    return Problem(
        (logits, target),
        ours=lambda logits, t: ops.cross_entropy(logits, t).mean(),
        eager=lambda logits, t: F.cross_entropy(logits.float(), t),
        oracle=lambda logits, t: reference.cross_entropy(logits, t).mean(),
        forward=Work(logits.nbytes, arithmetic=4 / logits.itemsize),
        both=Work(2 * logits.nbytes, arithmetic=7 / (2 * logits.itemsize)),
    )


@case
def linear_cross_entropy(size: Size, dtype: torch.dtype, device: torch.device) -> Problem:
    """The mean, a frozen head: the logits' product, and dx's with the backward pass."""
    rows, hidden_size, vocab = size.targets, size.model.hidden, size.model.vocab
    hidden = _normal(rows, hidden_size, dtype=dtype, device=device)
    weight = _normal(
        vocab, hidden_size, dtype=dtype, device=device, grad=False, std=hidden_size**-0.5
    )
    target = torch.randint(vocab, (rows,), device=device)
    forward, both = _matmul_work(linear_matmuls(rows, vocab, hidden_size))
    return Problem(
        (hidden, weight, target),
        ours=lambda h, w, t: ops.linear_cross_entropy(h, w, t).loss,
        eager=lambda h, w, t: F.cross_entropy(F.linear(h, w).float(), t),
        oracle=lambda h, w, t: reference.linear_cross_entropy(h, w, t)[0].mean(),
        forward=forward,
        both=both,
    )


@case
def lora_linear(size: Size, dtype: torch.dtype, device: torch.device) -> Problem:
    """q, k and v as one group. Useful work: the frozen products and LoRA's own."""
    tokens, rank, hidden = size.tokens, size.rank, size.model.hidden
    x = _normal(tokens, hidden, dtype=dtype, device=device)
    weights, factors = [], []
    for n, k in size.model.qkv:
        weights.append(_normal(n, k, dtype=dtype, device=device, grad=False, std=k**-0.5))
        factors.append(_normal(rank, k, dtype=torch.float32, device=device, std=k**-0.5))
        factors.append(_normal(n, rank, dtype=torch.float32, device=device, std=0.02))
    pairs = zip(factors[::2], factors[1::2], strict=True)
    adapters = [ops.LoraFactors(a, b, SCALING) for a, b in pairs]
    group = ops.LoraGroup.dense(weights, adapters)

    def plain(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(weights)
        pairs = zip(tensors[count::2], tensors[count + 1 :: 2], strict=True)
        return tuple(
            reference.lora_linear(x, AdaptedLinear(w, [ops.LoraFactors(a, b, SCALING)]))
            for w, (a, b) in zip(tensors[:count], pairs, strict=True)
        )

    matmuls = [m for n, k in size.model.qkv for m in linear_matmuls(tokens, n, k)]
    extra = sum(2 * tokens * rank * (n + k) for n, k in size.model.qkv)
    forward, both = _matmul_work(matmuls, extra_forward=extra, extra_both=3 * extra)
    return Problem(
        (x, *weights, *factors),
        ours=lambda x, *_: ops.lora_linear(x, group),
        eager=plain,
        oracle=plain,
        forward=forward,
        both=both,
    )


@case
def attention(size: Size, dtype: torch.dtype, device: torch.device) -> Problem:
    """Causal, packed. Useful work: the causal half of two products forward and four backward."""
    heads, kv_heads, dim = size.model.heads, size.model.kv_heads, size.model.head_dim
    q = _normal(size.tokens, heads, dim, dtype=dtype, device=device)
    k, v = (_normal(size.tokens, kv_heads, dim, dtype=dtype, device=device) for _ in range(2))
    bounds = cu_seqlens(size.lengths).to(device)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = []
        for parts in zip(*(x.split(size.lengths) for x in (q, k, v)), strict=True):
            qs, ks, vs = (x.transpose(0, 1)[None] for x in parts)
            out = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, enable_gqa=True)
            pieces.append(out[0].transpose(0, 1))
        return torch.cat(pieces)

    products = sum(2 * heads * dim * n * (n + 1) // 2 for n in size.lengths)
    mean = size.tokens // len(size.lengths)
    alike = linear_matmuls(size.tokens * heads, mean, dim)
    # What runs where it is forced alone.
    forced: dict[str, Function] = {}
    if device.type == "cuda" and dtype in backends.dtypes_of("attention", "cuda"):
        forced["ours, impl=cuda"] = lambda q, k, v: ops.attention(q, k, v, bounds, impl="cuda")
    return Problem(
        (q, k, v),
        ours=lambda q, k, v: ops.attention(q, k, v, bounds),
        eager=eager,
        oracle=lambda q, k, v: reference.attention(q, k, v, bounds),
        forward=Work(2 * products, alike),
        both=Work(6 * products, alike),
        more=forced,
    )


@case
def attention_decode(size: Size, dtype: torch.dtype, device: torch.device) -> Problem:
    """A new token behind each sequence of a cache: keys and values are read once."""
    heads, kv_heads, dim = size.model.heads, size.model.kv_heads, size.model.head_dim
    count, plain = len(size.lengths), {"dtype": dtype, "device": device, "grad": False}
    q = _normal(count, heads * dim, **plain)
    k, v = (_normal(count, kv_heads * dim, **plain) for _ in range(2))
    keys, values = (_normal(size.tokens, kv_heads * dim, **plain) for _ in range(2))
    first = cu_seqlens(size.lengths)[:-1].long()
    lengths = torch.tensor(size.lengths)
    slots, spans = first + lengths - 1, torch.stack((first, lengths), 1)
    bounds = torch.arange(count + 1, dtype=torch.int32)
    where = [x.to(device) for x in (slots, spans, bounds)]

    def decode(impl: str | None) -> Function:
        def call(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            cache = ops.CacheRows(keys, values, *where)
            return ops.attention_decode(q, k, v, cache, head_dim=dim, impl=impl)

        return call

    def eager(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        keys[where[0]], values[where[0]] = k, v
        rows = []
        for one, ks, vs in zip(
            q, keys.split(size.lengths), values.split(size.lengths), strict=True
        ):
            parts = (x.unflatten(-1, (-1, dim)).transpose(0, 1)[None] for x in (one[None], ks, vs))
            out = F.scaled_dot_product_attention(*parts, enable_gqa=True)
            rows.append(out[0, :, 0].flatten())
        return torch.stack(rows)

    return Problem(
        (q, k, v, keys, values),
        ours=decode(None),
        eager=eager,
        oracle=decode("reference"),
        forward=Work(2 * keys.nbytes, arithmetic=2 * heads / kv_heads / keys.itemsize),
        both=None,
        in_place=True,
    )


@case
def adamw(size: Size, dtype: torch.dtype, device: torch.device) -> Problem:
    """Gradient norm, clipping and one step over all adapters; float32 whatever the dtype.

    Ours has all of them in one buffer, as the engine does; PyTorch has a tensor for each, as PEFT
    does. Reads the gradients twice, the rest once, and writes parameters and moments.
    """
    model = size.model
    one_layer = [size.rank * width for shape in model.linears for width in shape]
    sizes = one_layer * model.layers
    params, grads, exp_avg = (
        _normal(sum(sizes), dtype=torch.float32, device=device, grad=False) for _ in range(3)
    )
    exp_avg_sq = exp_avg.square()

    def flat(functions: Any) -> Function:
        def step(*buffers: Tensor) -> tuple[Tensor, ...]:
            clip = {"grad_norm": functions.grad_norm(buffers[1]), "max_grad_norm": MAX_GRAD_NORM}
            functions.adamw_(*buffers, step=10, beta1=BETAS[0], beta2=BETAS[1], **clip, **ADAMW)
            return buffers[0], buffers[2], buffers[3]

        return step

    return Problem(
        (params, grads, exp_avg, exp_avg_sq),
        ours=flat(ops),
        eager=TorchAdamW(sizes),
        oracle=flat(reference),
        forward=Work(8 * params.nbytes, arithmetic=17 / 32),
        both=None,
        in_place=True,
        more={
            "pytorch foreach": TorchAdamW(sizes, foreach=True),
            "pytorch fused": TorchAdamW(sizes, fused=True),
        },
    )


class TorchAdamW:
    """clip_grad_norm_ and torch.optim.AdamW over the parts of flat buffers, `sizes` long.

    The optimizer stays, as in training, for as long as it is called with the same buffers. The
    gradients are clipped in place: from the second call on they are as long as they may be.
    """

    def __init__(self, sizes: Sequence[int], **options: bool) -> None:
        self.sizes, self.options = list(sizes), options
        self.buffers: tuple[Tensor, ...] = ()

    def __call__(self, *buffers: Tensor) -> tuple[Tensor, ...]:
        if len(self.buffers) != len(buffers) or any(
            a is not b for a, b in zip(self.buffers, buffers, strict=True)
        ):
            self._take(buffers)
        torch.nn.utils.clip_grad_norm_(self.params, MAX_GRAD_NORM)
        self.optimizer.step()
        return buffers[0], buffers[2], buffers[3]

    def _take(self, buffers: tuple[Tensor, ...]) -> None:
        self.buffers = buffers
        self.params, grads, exp_avg, exp_avg_sq = (x.split(self.sizes) for x in buffers)
        self.optimizer = torch.optim.AdamW(self.params, betas=BETAS, **self.options, **ADAMW)
        fused = bool(self.options.get("fused"))
        for param, grad, m, v in zip(self.params, grads, exp_avg, exp_avg_sq, strict=True):
            param.grad = grad
            step = torch.tensor(9.0, device=param.device if fused else "cpu")
            self.optimizer.state[param] = {"step": step, "exp_avg": m, "exp_avg_sq": v}


@case
def adamw_8bit(size: Size, dtype: torch.dtype, device: torch.device) -> Problem:
    """`adamw` with moments in 8 bits; PyTorch's is the reference, which makes them float32."""
    model = size.model
    count = model.layers * sum(size.rank * (n + k) for n, k in model.linears)
    params, grads, exp_avg = (
        _normal(count, dtype=torch.float32, device=device, grad=False) for _ in range(3)
    )
    quantize = reference.dynamic_code.quantize_blockwise
    m, m_absmax = quantize(exp_avg, signed=True)
    v, v_absmax = quantize(exp_avg.square(), signed=False)

    def ours(*buffers: Tensor) -> Tensor:
        ops.adamw_8bit_(*buffers, step=10, beta1=BETAS[0], beta2=BETAS[1], **ADAMW)
        return buffers[0]

    def plain(*buffers: Tensor) -> Tensor:
        reference.adamw_8bit_(*buffers, step=10, beta1=BETAS[0], beta2=BETAS[1], **ADAMW)
        return buffers[0]

    return Problem(
        (params, grads, m, v, m_absmax, v_absmax),
        ours=ours,
        eager=plain,
        oracle=plain,
        forward=Work(
            3 * params.nbytes + 2 * (m.nbytes + v.nbytes + m_absmax.nbytes + v_absmax.nbytes),
            arithmetic=19 / 16,
        ),
        both=None,
        in_place=True,
    )


@case
def blockwise_4bit(size: Size, dtype: torch.dtype, device: torch.device) -> Problem:
    """The largest weight of a layer out of NF4 with double quantisation, into memory that is kept.

    Reads codes and scales and writes the weight.
    """
    weight = _largest_weight(size, dtype, device)
    packed = ops.quantize_weight(weight, "nf4", double_quant=True)
    values = code_values("nf4", device)

    def eager(weight: Tensor) -> Tensor:
        codes, absmax, *nested = packed.tensors.values()
        scales = dequantize_absmax(absmax, *nested)
        both = torch.stack((codes >> 4, codes & 15), dim=1).view(-1, packed.format.block)
        return weight.copy_((values[both.int()] * scales[:, None]).view(weight.shape))

    return _decoding(packed, weight, eager)


@case
def packed_weight(size: Size, dtype: torch.dtype, device: torch.device) -> Problem:
    """The largest weight of a layer out of FP8 with a scale a row, into memory that is kept.

    Reads codes and scales and writes the weight.
    """
    weight = _largest_weight(size, dtype, device)
    packed = ops.quantize_weight(weight, "fp8")

    def eager(weight: Tensor) -> Tensor:
        codes, scale = packed.tensors["codes"], packed.tensors["scale"]
        return weight.copy_(codes.view(torch.float8_e4m3fn).float() * scale)

    return _decoding(packed, weight, eager)


def _largest_weight(size: Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    n, k = max(size.model.linears, key=lambda linear: linear[0] * linear[1])
    return _normal(n, k, dtype=dtype, device=device, grad=False)


def _decoding(
    packed: ops.QuantizedWeight, weight: Tensor, eager: Callable[[Tensor], Tensor]
) -> Problem:
    """All rows of `packed` into `weight`: a product for each value."""
    rows, moved = weight.shape[0], packed.nbytes + weight.nbytes
    return Problem(
        (weight,),
        ours=lambda w: packed.rows(0, rows, out=w),
        eager=eager,
        oracle=lambda w: packed.rows(0, rows, out=torch.empty_like(w), impl="reference"),
        forward=Work(moved, arithmetic=weight.numel() / moved),
        both=None,
        in_place=True,
    )


def _matmul_work(
    matmuls: Sequence[Matmul], *, extra_forward: int = 0, extra_both: int = 0
) -> tuple[Work, Work]:
    """Forward's work and both passes': the products, and operations besides them."""
    forward = tuple(m for m in matmuls if m.transposed)
    return (
        Work(sum(m.flops for m in forward) + extra_forward, forward),
        Work(sum(m.flops for m in matmuls) + extra_both, tuple(matmuls)),
    )
