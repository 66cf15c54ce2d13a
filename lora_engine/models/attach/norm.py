"""RMSNorm and LayerNorm modules, recognised by what they compute."""

import inspect
from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, nn

from lora_engine import ops
from lora_engine.models.attach.forwards import ReplacedForward, only_argument, uncompiled
from lora_engine.models.families.modules import RmsNorm
from lora_engine.models.families.structure import RMS_NORM
from lora_engine.values import PreNorm


class RmsNormForward(ReplacedForward):
    """The forward of an RMSNorm module, with `padding_columns` for the linears that read it.

    `offset` is 1 where the module keeps its weight as the difference from one, as Gemma's do.
    """

    operation = "rms_norm"

    def __init__(self, module: RmsNorm, offset: float, padding_columns: int = 0) -> None:
        self.module, self.offset, self.padding_columns = module, offset, padding_columns
        self.original: Callable[[Tensor], Tensor] = module.forward

    @property
    def eps(self) -> float:
        """The module's, as it is now."""
        return _eps(self.module)

    @uncompiled
    def __call__(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        if x is None:
            x = only_argument(self.original, named)
        if not self.takes(x):
            return self.original(x)
        return ops.rms_norm(
            x,
            self.module.weight,
            self.eps,
            offset=self.offset,
            padding_columns=self.padding_columns,
        )

    def takes(self, x: Tensor) -> bool:
        """Whether x has the weight's dtype; else (under autocast, say) the module's own runs."""
        return x.dtype == self.module.weight.dtype

    def prenorm(self) -> PreNorm:
        """This norm as a part of a block."""
        return PreNorm(self.module.weight, self.eps, self.offset)


class LayerNormForward(ReplacedForward):
    """The forward of an nn.LayerNorm, with `padding_columns` for the linears that read it."""

    operation = "layer_norm"

    def __init__(self, module: nn.LayerNorm, padding_columns: int = 0) -> None:
        self.module, self.padding_columns = module, padding_columns
        self.original = module.forward

    @uncompiled
    def __call__(self, input: Tensor) -> Tensor:  # as nn.LayerNorm.forward calls it
        module = self.module
        if any(p.dtype != input.dtype for p in (module.weight, module.bias) if p is not None):
            return self.original(input)
        return ops.layer_norm(
            input, module.weight, module.bias, module.eps, padding_columns=self.padding_columns
        )


def norm_forward(
    module: nn.Module, padding_columns: int = 0
) -> RmsNormForward | LayerNormForward | None:
    """Our forward for a norm over the last dimension, or None if `module` is not one we know."""
    if "forward" in vars(module):
        return None
    if type(module).forward is nn.LayerNorm.forward and isinstance(module, nn.LayerNorm):
        return (
            LayerNormForward(module, padding_columns) if len(module.normalized_shape) == 1 else None
        )
    if not _is_rms_norm(module):
        return None
    offset = _rms_norm_offset(module, _eps(module))
    return None if offset is None else RmsNormForward(module, offset, padding_columns)


def _eps(module: RmsNorm) -> float:
    return module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps


def _is_rms_norm(module: nn.Module) -> TypeGuard[RmsNorm]:
    """Whether its class is named RMSNorm, and it has a weight [H], an eps and nothing else."""
    weight = getattr(module, "weight", None)
    if RMS_NORM not in type(module).__name__ or not isinstance(weight, nn.Parameter):
        return False
    if weight.dim() != 1 or len(list(module.parameters())) != 1:
        return False
    if len(inspect.signature(module.forward).parameters) != 1:  # a gate, say
        return False
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps is not None


def _rms_norm_offset(module: RmsNorm, eps: float) -> float | None:
    """What the module adds to its weight, 0 or 1, by a try; None if neither gives its result."""
    weight = module.weight
    with torch.no_grad():
        probe = torch.linspace(-2.0, 3.0, 2 * weight.numel()).view(2, -1)
        probe = probe.to(weight.dtype).to(weight.device)
        expected = module(probe).float()
        tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
        for offset in (0.0, 1.0):
            actual = ops.rms_norm(probe, weight, eps, offset=offset, impl="reference").float()
            if torch.allclose(actual, expected, rtol=tolerance, atol=tolerance):
                return offset
    return None
