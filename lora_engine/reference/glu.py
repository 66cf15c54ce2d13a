"""Gated linear units (Shazeer, 2020, arXiv:2002.05202)."""

import torch.nn.functional as F
from torch import Tensor

from lora_engine.reference.numeric import upcast


def swiglu(
    gate: Tensor,  # [..., I]
    up: Tensor,  # [..., I]
) -> Tensor:
    """`silu(gate) * up`, in gate's dtype."""
    return (F.silu(upcast(gate)) * upcast(up)).to(gate.dtype)
