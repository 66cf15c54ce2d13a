"""The MLP half of a decoder layer (pre-norm, gated: arXiv:1910.07467, arXiv:2002.05202)."""

from collections.abc import Sequence

from torch import Tensor

from lora_engine.reference.glu import glu
from lora_engine.reference.lora_linear import lora_group, lora_linear
from lora_engine.reference.rms_norm import rms_norm
from lora_engine.values import AdaptedLinear, Dropout, PreNorm


def mlp_block(
    x: Tensor,  # [..., H]
    norm: PreNorm,
    gate_up: Sequence[AdaptedLinear],  # H to I, H to I
    down: AdaptedLinear,  # I to H
    *,
    activation: str = "silu",
    dropouts: tuple[Dropout | None, Dropout | None] = (None, None),
    routes: Tensor | None = None,  # [...] int64
) -> Tensor:
    """`x + down(act(gate) * up)` for `gate, up = gate_up(norm(x))`, [..., H] in x's dtype.

    `dropouts` are of gate and up, and of down; they and `routes` as for `lora_linear`.
    """
    normed = rms_norm(x, norm.weight, norm.eps, offset=norm.offset)
    gate, up = lora_group(normed, gate_up, dropout=dropouts[0], routes=routes)
    hidden = glu(gate, up, activation=activation)
    return lora_linear(hidden, down, dropout=dropouts[1], routes=routes, residual=x)
