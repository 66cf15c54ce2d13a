"""The useful arithmetic of one LoRA training step, and the products that bound its speed.

Useful is what a method cannot do without: padding, tokens that sequences begin with in common
more than once, recomputation (activation checkpointing, attention's backward), and the head and the
last layer's MLP on positions without a target are not counted, whoever does them. With T tokens in
pieces of l tokens after a shared prefix of p, U targets, rank r, a multiply-add as two:

    frozen linear [N, K]     forward 2·T·N·K      dx 2·T·N·K
    LoRA on it               forward 2·T·r·(N+K)  backward 4·T·r·(N+K): ds, dB, dx, dA
    attention, D = heads·d   forward 4·D·l(p + (l+1)/2), backward twice that: dv, dp, dq, dk
    head [V, H]              forward 2·U·V·H      dx 2·U·V·H

The first layer's q, k and v need no dx (2·T·N·K and LoRA's 2·T·r·K): nothing below is trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common.measure import Matmul, linear_matmuls

LinearShape = tuple[int, int]  # N, K
Piece = tuple[int, int]  # tokens before, tokens


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Llama-like model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def of(cls, config: Any) -> "ModelShape":
        """From the configuration of a transformers model."""
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocab=config.vocab_size,
        )

    @property
    def qkv(self) -> tuple[LinearShape, ...]:
        """One layer's linears that read the block's input."""
        keys = self.kv_heads * self.head_dim
        return (self.heads * self.head_dim, self.hidden), (keys, self.hidden), (keys, self.hidden)

    @property
    def linears(self) -> tuple[LinearShape, ...]:
        """All linears of one layer."""
        output = (self.hidden, self.heads * self.head_dim)
        return *self.qkv, output, *self.mlp

    @property
    def mlp(self) -> tuple[LinearShape, ...]:
        """One layer's linears of which the last layer's are needed for targets alone."""
        wide = (self.intermediate, self.hidden)
        return wide, wide, (self.hidden, self.intermediate)


def step_flops(shape: ModelShape, rank: int, pieces: Sequence[Piece], targets: int) -> int:
    """Useful floating-point operations of one step, LoRA of rank `rank` on every linear.

    pieces: (tokens before, tokens) of each sequence without what an earlier one has in common with
    it, which are the tokens before. targets: supervised tokens in all of them.
    """
    tokens = sum(own for _, own in pieces)
    linears = sum(_linear_flops(tokens, rank, *linear) for linear in shape.linears)
    width = shape.heads * shape.head_dim
    pairs = sum(own * before + own * (own + 1) // 2 for before, own in pieces)
    unneeded = sum(2 * tokens * k * (n + rank) for n, k in shape.qkv)
    unneeded += sum(_linear_flops(tokens - targets, rank, *linear) for linear in shape.mlp)
    head = 4 * targets * shape.vocab * shape.hidden
    return shape.layers * (linears + 3 * 4 * width * pairs) - unneeded + head


def full_step_flops(shape: ModelShape, pieces: Sequence[Piece], targets: int) -> int:
    """As `step_flops`, of a step that trains every weight: 2·T·N·K more for each dW, no rank.

    The gathered embedding costs nothing; nothing below the first layer makes its dx needless.
    """
    tokens = sum(own for _, own in pieces)
    linears = sum(6 * tokens * n * k for n, k in shape.linears)
    pairs = sum(own * before + own * (own + 1) // 2 for before, own in pieces)
    attention = 3 * 4 * shape.heads * shape.head_dim * pairs
    unneeded = sum(6 * (tokens - targets) * n * k for n, k in shape.mlp)
    return (
        shape.layers * (linears + attention) - unneeded + 6 * targets * shape.vocab * shape.hidden
    )


def _linear_flops(rows: int, rank: int, n: int, k: int) -> int:
    return 4 * rows * n * k + 6 * rows * rank * (n + k)


def layer_matmuls(shape: ModelShape, tokens: int) -> list[Matmul]:
    """One decoder layer's frozen products, forward and backward."""
    return [matmul for n, k in shape.linears for matmul in linear_matmuls(tokens, n, k)]


def head_matmuls(shape: ModelShape, targets: int) -> list[Matmul]:
    """The head's products on the rows that have a target."""
    return list(linear_matmuls(targets, shape.vocab, shape.hidden))
