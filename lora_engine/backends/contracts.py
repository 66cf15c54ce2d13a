"""What the modules that launch an operation's kernels have to offer, one protocol an operation.

backends/cpu, backends/triton and backends/cuda keep them, each by a module of functions with these
names and arguments. Callers in `ops` have checked shapes and dtypes; results are written into
tensors that they made. Rows may be any stride apart, columns are one apart.
"float32" of a result is the arithmetic's dtype: float64 for float64 operands.
The products with adapters have theirs in lora_contracts.py.
"""

from typing import Protocol

from torch import Tensor

from lora_engine.quantization.format import Blocks, BlockScales, Scaled
from lora_engine.values import AdamWHyper


class RmsNorm(Protocol):
    """x and y (dy, h and dx) are [rows, cols], or [tokens, heads, cols] without a residual (dh)."""

    def rms_norm_fwd(
        self,
        x: Tensor,  # [rows, cols] or [tokens, heads, cols]
        residual: Tensor | None,  # [rows, cols]
        weight: Tensor,  # [cols]
        y: Tensor,  # as x
        h: Tensor | None,  # [rows, cols], contiguous; given with residual; else a copy
        rstd: Tensor,  # [rows] float32
        eps: float,
        offset: float,
    ) -> None:
        """Writes y and rstd, and h = x + residual, if given."""

    def rms_norm_bwd(
        self,
        dy: Tensor,  # as h
        dh: Tensor | None,  # [rows, cols]; added to dx
        h: Tensor,  # what was normed
        weight: Tensor,  # [cols]
        rstd: Tensor,  # [rows] float32
        dx: Tensor,  # as h; may be dy
        dweight: Tensor | None,  # [cols] float32
        offset: float,
    ) -> None:
        """Writes dx, and dweight if given."""


class LayerNorm(Protocol):
    def layer_norm_fwd(
        self,
        x: Tensor,  # [rows, cols]
        weight: Tensor | None,  # [cols]
        bias: Tensor | None,  # [cols]
        y: Tensor,  # [rows, cols]
        mean: Tensor,  # [rows] float32
        rstd: Tensor,  # [rows] float32
        eps: float,
    ) -> None:
        """Writes y, mean and rstd."""

    def layer_norm_bwd(
        self,
        dy: Tensor,  # [rows, cols]
        x: Tensor,  # [rows, cols]
        weight: Tensor | None,  # [cols]
        mean: Tensor,  # [rows] float32
        rstd: Tensor,  # [rows] float32
        dx: Tensor,  # [rows, cols]
        dweight: Tensor | None,  # [cols] float32
        dbias: Tensor | None,  # [cols] float32
    ) -> None:
        """Writes dx, and dweight and dbias if given."""


class Rope(Protocol):
    def rope(
        self,
        q: Tensor | None,  # [tokens, q_heads, head_dim]
        k: Tensor | None,  # [tokens, kv_heads, head_dim]; q or k is given
        q_out: Tensor | None,  # q's shape
        k_out: Tensor | None,  # k's shape
        cos: Tensor,  # [positions, rotary_dim]
        sin: Tensor,  # [positions, rotary_dim]
        position_ids: Tensor | None,  # [tokens] int64 or int32, within the tables
        *,
        interleaved: bool,
        inverse: bool,
    ) -> None:
        """Writes q_out and k_out; `inverse` is the transposed rotation, the backward pass."""


class Glu(Protocol):
    def glu_fwd(
        self,
        gate: Tensor,  # [rows, cols]
        up: Tensor,  # [rows, cols]
        y: Tensor,  # [rows, cols]
        *,
        activation: str,
    ) -> None:
        """Writes y."""

    def glu_bwd(
        self,
        dy: Tensor,  # [rows, cols]
        gate: Tensor,  # [rows, cols]
        up: Tensor,  # [rows, cols]
        dgate: Tensor,  # [rows, cols]; may be gate
        dup: Tensor,  # [rows, cols]; may be up
        h: Tensor | None = None,  # [rows, cols]; may be dy
        *,
        activation: str,
    ) -> None:
        """Writes dgate and dup, and the forward result into h if given."""


class CrossEntropy(Protocol):
    def cross_entropy(
        self,
        logits: Tensor,  # [rows, cols]
        target: Tensor,  # [rows] int64
        loss: Tensor,  # [rows] float32
        logprob: Tensor,  # [rows] float32
        correct: Tensor,  # [rows] bool
        *,
        ignore_index: int,
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        entropy: Tensor | None = None,  # [rows] float32
        lse: Tensor | None = None,  # [rows] float32
        grad: Tensor | None = None,  # [rows, cols] in logits' dtype; may be logits
    ) -> None:
        """Writes loss, logprob, correct and what is given of entropy, lse and grad."""

    def cross_entropy_bwd(
        self,
        logits: Tensor,  # [rows, cols]
        target: Tensor,  # [rows] int64
        lse: Tensor,  # [rows] float32, as `cross_entropy` wrote it
        grad_scale: Tensor,  # [rows] float32: a factor of each row's gradient
        grad: Tensor,  # [rows, cols] in logits' dtype; may be logits
        *,
        ignore_index: int,
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
    ) -> None:
        """Writes grad as `cross_entropy` would, from its lse, times grad_scale."""


class Attention(Protocol):
    def attention_fwd(
        self,
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
        """Writes o and lse, the logarithm of each query's sum of exponentials."""

    def attention_bwd(
        self,
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
        """Writes dq, dk and dv."""


class AttentionDecode(Protocol):
    def attention_decode(
        self,
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
        """Writes o, and k (rotated) and v into the cache's rows `slots`."""


class AdamW(Protocol):
    def adamw(
        self,
        params: Tensor,  # [P] float32, as the others
        grads: Tensor,  # [P]
        exp_avg: Tensor,  # [P]
        exp_avg_sq: Tensor,  # [P]
        hyper: AdamWHyper,
        grad_norm: Tensor | None,  # [] of grads; given with hyper.max_grad_norm
    ) -> None:
        """Updates params, exp_avg and exp_avg_sq."""

    def grad_norm(
        self,
        grads: Tensor,  # [P] float32
        norm: Tensor,  # [], as grads
    ) -> None:
        """Writes norm."""


class AdamW8bit(Protocol):
    def adamw_8bit(
        self,
        params: Tensor,  # [P] float32
        grads: Tensor,  # [P] float32
        exp_avg: Tensor,  # [P] uint8
        exp_avg_sq: Tensor,  # [P] uint8
        exp_avg_absmax: Tensor,  # [ceil(P / 256)] float32
        exp_avg_sq_absmax: Tensor,  # [ceil(P / 256)] float32
        hyper: AdamWHyper,
        grad_norm: Tensor | None,  # [] of grads; given with hyper.max_grad_norm
    ) -> None:
        """Updates params, exp_avg, exp_avg_sq and both absmax."""


class Blockwise4bit(Protocol):
    """The format is `quantization.blockwise_4bit`'s, whose tables are passed in."""

    def quantize_4bit(
        self,
        w: Tensor,  # [N, K], contiguous
        bounds: Tensor,  # [15] float32
        ascending: Tensor,  # [16] uint8
        codes: Tensor,  # [ceil(N K / 2)] uint8
        absmax: Tensor,  # [ceil(N K / block)] float32
        block: int,
    ) -> None:
        """Writes codes and absmax."""

    def dequantize_4bit(
        self,
        codes: Tensor,  # [ceil(N K / 2)] uint8
        scales: BlockScales,
        values: Tensor,  # [16] float32
        w: Tensor,  # [rows, K]
        first: int,  # the place of w[0, 0] among the weight's values
        block: int,
    ) -> None:
        """Writes w."""


class KQuants(Protocol):
    def quantize_k(
        self,
        w: Tensor,  # [N, K] float32, contiguous, K a multiple of 256
        codes: Tensor,  # [N, bytes of a row] uint8, contiguous
        kind: str,
    ) -> None:
        """Writes codes."""


class PackedWeight(Protocol):
    """Weights in the formats of `quantization` that PyTorch's operations decode too."""

    def decode_scaled(
        self,
        packed: Scaled,  # codes [R, bytes], contiguous rows
        w: Tensor,  # [R, K]
    ) -> None:
        """Writes w."""

    def decode_blocks(
        self,
        packed: Blocks,  # codes [R, bytes], contiguous rows
        w: Tensor,  # [R, K]
    ) -> None:
        """Writes w."""
