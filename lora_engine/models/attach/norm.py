"""RMSNorm and LayerNorm modules, recognised by what they compute."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine import ops
from lora_engine.models.attach.patches import only_argument
from lora_engine.models.families.structure import RMS_NORM, RMS_NORM_EPS
from lora_engine.values import PreNorm


class RmsNormForward:
    """The forward of an RMSNorm module, with `tail` padding columns for the linears that read it.

    `offset` is 1 where the module keeps its weight as the difference from one, as Gemma's do.
    """

    operation = "rms_norm"

    def __init__(self, module: Any, offset: float, tail: int = 0) -> None:
        self.module, self.offset, self.tail = module, offset, tail
        self.original = module.forward

    @property
    def eps(self) -> float:
        """The module's, as it is now."""
        return _eps(self.module)

    def __call__(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        if x is None:
            x = only_argument(self.original, named)
        if not self.takes(x):
            result: Tensor = self.original(x)
            return result
        return ops.rms_norm(x, self.module.weight, self.eps, offset=self.offset, tail=self.tail)

    def takes(self, x: Tensor) -> bool:
        """Whether x has the weight's dtype; else (under autocast, say) the module's own runs."""
        weight: Tensor = self.module.weight
        return x.dtype == weight.dtype

    def prenorm(self) -> PreNorm:
        """This norm as a part of a block."""
        return PreNorm(self.module.weight, self.eps, self.offset)


class LayerNormForward:
    """The forward of an nn.LayerNorm, with `tail` padding columns for the linears that read it."""

    operation = "layer_norm"

    def __init__(self, module: nn.LayerNorm, tail: int = 0) -> None:
        self.module, self.tail = module, tail
        self.original = module.forward

    def __call__(self, input: Tensor) -> Tensor:  # as nn.LayerNorm.forward calls it
        module = self.module
        if any(p.dtype != input.dtype for p in (module.weight, module.bias) if p is not None):
            return self.original(input)
        return ops.layer_norm(input, module.weight, module.bias, module.eps, tail=self.tail)


def norm_forward(module: nn.Module, tail: int = 0) -> RmsNormForward | LayerNormForward | None:
    """Our forward for a norm over the last dimension, or None if `module` is not one we know."""
    if "forward" in vars(module):
        return None
    if type(module).forward is nn.LayerNorm.forward and isinstance(module, nn.LayerNorm):
        return LayerNormForward(module, tail) if len(module.normalized_shape) == 1 else None
    eps = _rms_norm_eps(module)
    offset = None if eps is None else _rms_norm_offset(module, eps)
    return None if eps is None or offset is None else RmsNormForward(module, offset, tail)


def _eps(module: nn.Module) -> Any:
    return next((getattr(module, name) for name in RMS_NORM_EPS if hasattr(module, name)), None)


def _rms_norm_eps(module: nn.Module) -> float | None:
    """The eps of a class named RMSNorm with a one-dimensional weight and nothing else."""
    weight = getattr(module, "weight", None)
    if RMS_NORM not in type(module).__name__ or not isinstance(weight, nn.Parameter):
        return None
    if weight.dim() != 1 or len(list(module.parameters())) != 1:
        return None
    if len(inspect.signature(module.forward).parameters) != 1:  # a gate, say
        return None
    eps: float | None = _eps(module)
    return eps


def _rms_norm_offset(module: Any, eps: float) -> float | None:
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
