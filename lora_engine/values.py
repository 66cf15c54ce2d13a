"""Values that say what is to be computed, for operations, kernels and the reference alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Dropout:
    """The probability `p` of dropping an element, and the seed that says which are dropped.

    Raises ValueError unless 0 <= p < 1 and 0 <= seed < 2^64.
    """

    p: float
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise ValueError(f"dropout: p={self.p} is not in [0, 1)")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"dropout: seed={self.seed} is not in [0, 2^64)")

    @property
    def key(self) -> tuple[int, int]:
        """The seed's low and high word, of 32 bits each."""
        return self.seed & WORD, self.seed >> 32

    @property
    def threshold(self) -> int:
        """An element is kept if its word is at least this."""
        return min(round(self.p * 2**32), WORD)

    @property
    def scale(self) -> float:
        """What kept elements are multiplied by."""
        return 1 / (1 - self.p)


@dataclass(frozen=True)
class LoraFactors:
    """One adapter of one linear: `y += scaling * (x lora_aᵀ) lora_bᵀ`.

    magnitude: DoRA's (arXiv:2402.09353): the linear's whole output before its bias is multiplied by
        `magnitude / norm`, norm [N] being the length of each row of W + scaling B A, through which
        no gradient goes.
    adapter: which adapter this is, for rows that are routed by adapter.
    bias: lora_b's: `scaling * bias` is added too.
    """

    lora_a: Tensor  # [r, K]
    lora_b: Tensor  # [N, r]
    scaling: float
    magnitude: Tensor | None = None  # [N]
    adapter: int = 0
    bias: Tensor | None = None  # [N]


@dataclass(frozen=True)
class AdaptedLinear:
    """One linear and all the adapters it has, each of them trained or not.

    merged: whether the weight has what the adapters add in it, quantised: they add nothing more,
        and get straight-through gradients.
    """

    weight: Tensor  # [N, K]
    adapters: Sequence[LoraFactors] = ()
    bias: Tensor | None = None  # [N]
    merged: bool = False


@dataclass(frozen=True)
class PreNorm:
    """The RMSNorm before half a decoder layer, or of a head: `x / rms(x) * (offset + weight)`."""

    weight: Tensor  # [H] or [D]
    eps: float
    offset: float = 0.0


class AdamWHyper(NamedTuple):
    """The numbers of one AdamW step.

    bias_correction: 1 - beta**step, of either beta.
    max_grad_norm: what the gradients are clipped to; None where no norm is given.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    bias_correction1: float
    bias_correction2: float
    max_grad_norm: float | None = None

    @staticmethod
    def of_step(
        step: int,  # from 1
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        max_grad_norm: float | None,
    ) -> "AdamWHyper":
        """The numbers of the step that is the `step`th."""
        beta1, beta2 = betas
        return AdamWHyper(
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            bias_correction1=1 - beta1**step,
            bias_correction2=1 - beta2**step,
            max_grad_norm=max_grad_norm,
        )


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type arithmetic on operands of `dtype` is done in: float32, except for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
