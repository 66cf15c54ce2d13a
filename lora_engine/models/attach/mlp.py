"""Gated MLPs: gate and up as one product, the activation writing where the next product reads."""

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, nn

from lora_engine import ops
from lora_engine.models.attach.forwards import ReplacedForward, only_argument, uncompiled
from lora_engine.models.attach.linear_group import LinearGroup, are_altered
from lora_engine.models.families.modules import GatedMlp
from lora_engine.models.peft.lora_state import hooks_everywhere
from lora_engine.values import ACTIVATIONS


class MlpForward(ReplacedForward):
    """The forward of a module with gate_proj, up_proj, down_proj, by `ops.glu`."""

    def __init__(
        self, module: GatedMlp, gate_up: LinearGroup, down: LinearGroup, activation: str
    ) -> None:
        self.module, self.gate_up, self.down, self.activation = module, gate_up, down, activation
        self.original: Callable[[Tensor], Tensor] = module.forward
        self.act_fn = module.act_fn
        self.act_call = type(module.act_fn).__call__

    @uncompiled
    def __call__(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        if x is None:
            x = only_argument(self.original, named)
        if not self.intact():
            return self.original(x)
        gate, up = self.gate_up(x)
        hidden = ops.glu(
            gate,
            up,
            activation=self.activation,
            padding_columns=self.down.padding_columns,
            grad_padding_columns=self.gate_up.padding_columns,
        )
        (y,) = self.down(hidden)
        return y

    def intact(self) -> bool:
        """Whether the module's parts are those that this forward was made of."""
        module = self.module
        if module.act_fn is not self.act_fn or type(self.act_fn).__call__ is not self.act_call:
            return False
        if isinstance(self.act_fn, nn.Module) and (
            hooks_everywhere() or are_altered(self.act_fn.modules())
        ):
            return False
        return self.gate_up.stands_for(module.gate_proj, module.up_proj) and self.down.stands_for(
            module.down_proj
        )


def is_gated_mlp(module: nn.Module) -> TypeGuard[GatedMlp]:
    """Whether `module` has the parts of a gated MLP."""
    return (
        hasattr(module, "gate_proj")
        and hasattr(module, "up_proj")
        and hasattr(module, "down_proj")
        and hasattr(module, "act_fn")
    )


def activation_name(activation: Callable[[Tensor], object]) -> str | None:
    """Which of `ops.glu`'s activations `activation` computes, by trying it; None if none."""
    x = torch.linspace(-6.0, 6.0, 33)
    try:
        y = activation(x)
    except (TypeError, ValueError, RuntimeError):
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    one = torch.ones_like(x)
    for name in ACTIVATIONS:
        if torch.allclose(y, ops.glu(x, one, activation=name, impl="reference"), atol=1e-6):
            return name
    return None
