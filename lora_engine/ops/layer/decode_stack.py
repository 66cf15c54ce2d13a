"""New tokens through all layers of a decoder, by kernel calls that are prepared once."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_engine import backends
from lora_engine.backends import contracts, launchers
from lora_engine.ops.attention_decode import CacheRows
from lora_engine.ops.lora.few_rows import PreparedGroup, prepare
from lora_engine.ops.lora.group import LoraGroup
from lora_engine.ops.tensors import accumulate_dtype
from lora_engine.values import PreNorm


class DecodedLayer(NamedTuple):
    """What a decoder layer computes with: x + output(attention(qkv(norm x))), then its gated MLP.

    head_norms: of queries and of keys; None: there are none.
    """

    attention_norm: PreNorm
    qkv: LoraGroup
    head_norms: tuple[PreNorm, PreNorm] | None
    output: LoraGroup
    mlp_norm: PreNorm
    gate_up: LoraGroup
    down: LoraGroup
    activation: str
    head_dim: int
    softmax_scale: float
    window: int


class _Prepared(NamedTuple):
    layer: DecodedLayer
    qkv: PreparedGroup
    output: PreparedGroup
    gate_up: PreparedGroup
    down: PreparedGroup


class _Buffers(NamedTuple):
    """What the layers write, for M tokens."""

    normed: Tensor  # [M, H]
    rstd: Tensor  # [M heads]
    qkv: Tensor  # [M, (Hq + 2 Hkv) D]
    attended: Tensor  # [M, Hq D]
    between: Tensor  # [M, H]
    gate_up: Tensor  # [M, 2 I]
    hidden: Tensor  # [M, I]


class _Kernels(NamedTuple):
    """What launches the operations between a layer's products."""

    norm: contracts.RmsNorm
    attention: contracts.AttentionDecode
    gate: contracts.Glu


class DecodeStack:
    """The layers of a decoder for up to `rows` new tokens at a time, without gradients.

    It computes with the tensors that the groups hold when it is made: one is made for as long as
    nobody exchanges adapters or weights. Writing into them is seen.

    Attributes: rows.
    """

    def __init__(self, layers: Sequence[_Prepared], rows: int, kernels: _Kernels) -> None:
        self._layers, self.rows, self._kernels = layers, rows, kernels
        self._buffers: dict[int, _Buffers] = {}

    @staticmethod
    def prepared(layers: Sequence[DecodedLayer], rows: int) -> "DecodeStack | None":
        """None where a layer's products are not for the kernel of few rows (`few_rows.prepare`)."""
        prepared = []
        for layer in layers:
            groups = (layer.qkv, layer.output, layer.gate_up, layer.down)
            qkv, output, gate_up, down = (prepare(group, rows) for group in groups)
            if qkv is None or output is None or gate_up is None or down is None:
                return None
            prepared.append(
                _Prepared(layer=layer, qkv=qkv, output=output, gate_up=gate_up, down=down)
            )
        base = layers[0].qkv.base
        if not backends.runs_fused("decode_stack", base.device, base.dtype):
            return None
        norm, attention, gate = (
            backends.select(operation, base.device, base.dtype)
            for operation in ("rms_norm", "attention_decode", "glu")
        )
        kernels = _Kernels(
            norm=launchers.rms_norm(norm),
            attention=launchers.attention_decode(attention),
            gate=launchers.glu(gate),
        )
        return DecodeStack(prepared, rows, kernels)

    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,  # [M, H], M at most `rows`; written
        cos: Tensor,  # [M, D]
        sin: Tensor,  # [M, D]
        caches: Sequence[CacheRows],
    ) -> Tensor:
        """The last layer's hidden states [M, H], before a final norm; x itself, written.

        caches: each layer's, whose slots and spans were checked.
        """
        buffers = self._buffers.get(x.shape[0])
        if buffers is None:
            buffers = self._buffers[x.shape[0]] = self._allocate(x)
        number = accumulate_dtype(x.dtype)
        cos, sin = cos.to(number).contiguous(), sin.to(number).contiguous()
        for prepared, cache in zip(self._layers, caches, strict=True):
            _run(self._kernels, prepared, x, cos, sin, cache, buffers)
        return x

    def _allocate(self, x: Tensor) -> _Buffers:
        rows, layer = x.shape[0], self._layers[0].layer
        qkv, inner = sum(layer.qkv.out_features), sum(layer.gate_up.out_features)
        queries, heads = layer.output.in_features, layer.output.in_features // layer.head_dim
        return _Buffers(
            normed=torch.empty_like(x),
            rstd=x.new_empty(rows * heads, dtype=accumulate_dtype(x.dtype)),
            qkv=x.new_empty(rows, qkv),
            attended=x.new_empty(rows, queries),
            between=torch.empty_like(x),
            gate_up=x.new_empty(rows, inner),
            hidden=x.new_empty(rows, inner // 2),
        )


def _run(
    kernels: _Kernels,
    prepared: _Prepared,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: CacheRows,
    to: _Buffers,
) -> None:
    """One layer; x is read and written."""
    layer, rows = prepared.layer, x.shape[0]
    rstd = to.rstd[:rows]
    _norm(kernels.norm, layer.attention_norm, x, to.normed, rstd)
    prepared.qkv(to.normed, to.qkv)
    q, k, v = to.qkv.split(layer.qkv.out_features, dim=1)
    if layer.head_norms is not None:
        for norm, heads in zip(layer.head_norms, (q, k), strict=True):
            each = heads.unflatten(1, (-1, layer.head_dim))
            _norm(kernels.norm, norm, each, each, to.rstd[: rows * each.shape[1]])
    kernels.attention.attention_decode(
        q,
        k,
        v,
        cos,
        sin,
        keys=cache.keys,
        values=cache.values,
        slots=cache.slots,
        spans=cache.spans,
        cu_spans=cache.cu_spans,
        o=to.attended,
        head_dim=layer.head_dim,
        scale=layer.softmax_scale,
        window=layer.window,
    )
    prepared.output(to.attended, to.between, x)
    _norm(kernels.norm, layer.mlp_norm, to.between, to.normed, rstd)
    prepared.gate_up(to.normed, to.gate_up)
    gate, up = to.gate_up.split(layer.gate_up.out_features, dim=1)
    kernels.gate.glu_fwd(gate, up, to.hidden, activation=layer.activation)
    prepared.down(to.hidden, x, to.between)


def _norm(kernels: contracts.RmsNorm, norm: PreNorm, x: Tensor, y: Tensor, rstd: Tensor) -> None:
    kernels.rms_norm_fwd(x, None, norm.weight, y, None, rstd, norm.eps, norm.offset)
