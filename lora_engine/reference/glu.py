"""Gated linear units (Shazeer, 2020, arXiv:2002.05202)."""

import torch.nn.functional as F
from torch import Tensor

from lora_engine.reference.numeric import upcast
from lora_engine.values import ACTIVATIONS


def glu(
    gate: Tensor,  # [..., I]
    up: Tensor,  # [..., I]
    *,
    activation: str = "silu",
) -> Tensor:
    """`act(gate) * up`, in gate's dtype; the activation is one of ACTIVATIONS."""
    gate32 = upcast(gate)
    if activation == "silu":
        act = F.silu(gate32)
    elif activation == "gelu":
        act = F.gelu(gate32)
    elif activation == "gelu_tanh":
        act = F.gelu(gate32, approximate="tanh")
    else:
        raise ValueError(f"activation {activation!r}: expected one of {', '.join(ACTIVATIONS)}")
    return (act * upcast(up)).to(gate.dtype)
