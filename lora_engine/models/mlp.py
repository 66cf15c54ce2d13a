"""Gated MLPs: gate and up as one product, the activation writing where the next product reads."""

from typing import Any

import torch
from torch import Tensor

from lora_engine import ops
from lora_engine.models.linear_group import LinearGroup


class MlpForward:
    """The forward of a module with gate_proj, up_proj, down_proj and SiLU."""

    def __init__(self, gate_up: LinearGroup, down: LinearGroup) -> None:
        self.gate_up, self.down = gate_up, down

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x)
        hidden = ops.swiglu(gate, up, tail=self.down.tail, grad_tail=self.gate_up.tail)
        (y,) = self.down(hidden)
        return y


def is_gated_mlp(module: Any) -> bool:
    """Whether `module` has the parts of a gated MLP."""
    return all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))


def is_silu(activation: Any) -> bool:
    """Whether `activation` computes SiLU, by trying it."""
    x = torch.linspace(-6.0, 6.0, 33)
    try:
        y = activation(x)
    except (TypeError, ValueError, RuntimeError):
        return False
    return isinstance(y, Tensor) and torch.allclose(y, torch.nn.functional.silu(x), atol=1e-6)
