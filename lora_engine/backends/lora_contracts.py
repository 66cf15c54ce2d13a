"""What the modules that launch products with adapters have to offer, as contracts.py for others."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from lora_engine.backends.lora_parts import (
    AdapterPart,
    Added,
    DyGradients,
    GroupAdapter,
    GroupLinear,
    Placing,
    ScaledColumns,
    ScaledRows,
    Span,
    XGradient,
)
from lora_engine.values import Dropout


class LoraLinear(Protocol):
    def place_factors(
        self,
        lora_a: Tensor,  # [R, K]
        lora_b: Tensor,  # [N, R]
        placings: Sequence[Placing],
    ) -> None:
        """Writes A and scaling * B of each adapter to its place, rounded once."""

    def lora_a_fwd(
        self,
        x: Tensor,  # [M, K]
        lora_a: Tensor,  # [R, K]
        s: Tensor,  # [M, R]
        spans: Sequence[Span],
        dropout: Dropout | None = None,
        copy: Tensor | None = None,  # [M, R]
    ) -> None:
        """Writes s = drop_i(x) lora_aᵀ, and 0 in columns of no span; to copy too."""

    def lora_b_bwd(
        self,
        dy: Tensor,  # [M, N]
        lora_b: Tensor,  # [N, R]
        s: Tensor,  # [M, R]
        ds: Tensor,  # [M, R]
        d_lora_b: Tensor | None,  # [E] float32
        spans: Sequence[Span],
        parts: Sequence[AdapterPart] = (),
        scaled: ScaledRows | None = None,
        added: Sequence[Added] = (),
    ) -> None:
        """Writes ds = dy lora_b, each linear's columns alone, and d_lora_b = scale dyᵀ s of each
        part, one [n, r] after the other; and what `scaled` asks for. Without d_lora_b the same
        is added to what `added` has for each adapter.

        Columns of ds in no span become 0.
        """

    def lora_a_bwd(
        self,
        ds: Tensor,  # [M, R]
        x: Tensor,  # [M, K]
        d_lora_a: Tensor | None,  # [R, K] float32
        spans: Sequence[Span],
        dropout: Dropout | None = None,
        scaled: ScaledColumns | None = None,
        added: Sequence[Added] = (),
    ) -> None:
        """Writes d_lora_a = dsᵀ drop_i(x), its columns times `scaled`, and 0 in rows of no span.

        Without d_lora_a the same is added to what `added` has for each adapter.
        """

    def lora_linear_fwd(
        self,
        x: Tensor,  # [M, K]
        weight: Tensor,  # [N, K]
        s: Tensor,  # [M, R]
        lora_b: Tensor,  # [N, R]
        y: Tensor,  # [M, N]
        bias: Tensor | None = None,  # [N]
    ) -> None:
        """Writes y = x weightᵀ + s lora_bᵀ + bias.

        Every column of s and lora_b is read: those in no span must be zero in one, finite in the
        other.
        """

    def lora_linear_dx(
        self,
        dy: Tensor,  # [M, N]
        weight: Tensor,  # [N, K]
        ds: Tensor,  # [M, R]
        lora_a: Tensor,  # [R, K]
        dx: Tensor,  # [M, K]
        spans: Sequence[Span],
        dropout: Dropout | None = None,
    ) -> None:
        """Writes dx = dy weight + ds lora_a, each linear's share of the second under its mask."""


class FewRows(Protocol):
    """Products without gradients that read the weights and the adapters where they are."""

    def lora_linear_few_rows(
        self,
        x: Tensor,  # [M, K]
        weight: Tensor,  # [N, K]
        linears: Sequence[GroupLinear],
        adapters: Sequence[GroupAdapter],
        y: Tensor,  # [M, N]
        residual: Tensor | None = None,  # [M, N]
    ) -> None:
        """Writes y = x weightᵀ + scaling (x lora_aᵀ) lora_bᵀ + bias + residual, rounded once.

        Biases and the residual are of x's dtype, and the factors are rounded to it, as x lora_aᵀ
        is. Adapters stand in the order of their linears.
        """


class GluLora(Protocol):
    """A gated activation between a group (gate, up) and a linear that reads its result.

    It does what `Glu` and `LoraLinear` do one after the other, to their rounding.
    """

    def glu_lora_fwd(
        self,
        gate: Tensor,  # [M, K]
        up: Tensor,  # [M, K]
        y: Tensor,  # [M, K]
        lora_a: Tensor,  # [R, K]
        s: Tensor,  # [M, R]
        spans: Sequence[Span],
        copy: Tensor | None = None,  # [M, R]
        *,
        activation: str,
    ) -> None:
        """Writes y, and s and copy as `lora_a_fwd` of y."""

    def glu_lora_bwd(
        self,
        dy: Tensor,  # [M, K]
        gate: Tensor,  # [M, K]
        up: Tensor,  # [M, K]
        dgate: Tensor,  # [M, K]
        dup: Tensor,  # [M, K]
        inner: DyGradients,  # N = 2 K
        outer: XGradient | None,
        *,
        activation: str,
    ) -> None:
        """Writes dgate and dup, and what the linears' gradients take of this pass.

        That is ds, d_lora_b and what `scaled` asks for of `inner`, as `lora_b_bwd` of dgate and
        dup side by side, and d_lora_a of `outer`, as `lora_a_bwd` of the forward result.
        """
