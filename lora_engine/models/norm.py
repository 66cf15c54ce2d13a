"""RMSNorm modules, recognised by what they compute."""

from typing import Any

import torch
from torch import Tensor, nn

from lora_engine import ops, reference
from lora_engine.ops.blocks import PreNorm


class RmsNormForward:
    """The forward of an RMSNorm module; `tail` columns are left for the linears that read it."""

    def __init__(self, module: Any, eps: float, tail: int = 0) -> None:
        self.module, self.eps, self.tail = module, eps, tail

    def __call__(self, hidden_states: Tensor) -> Tensor:
        return ops.rms_norm(hidden_states, self.module.weight, self.eps, tail=self.tail)

    def prenorm(self) -> PreNorm:
        """This norm as a part of a block."""
        return PreNorm(self.module.weight, self.eps)


def rms_norm_eps(module: nn.Module) -> float | None:
    """The eps of an RMSNorm module, or None if `module` is not one.

    A class named RMSNorm with a one-dimensional weight and nothing else counts if a try gives what
    `reference.rms_norm` gives (Gemma's 1 + weight, for one, does not).
    """
    weight = getattr(module, "weight", None)
    if "RMSNorm" not in type(module).__name__ or not isinstance(weight, nn.Parameter):
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight.dim() != 1 or eps is None or len(list(module.parameters())) != 1:
        return None
    with torch.no_grad():
        probe = torch.linspace(-2.0, 3.0, 2 * weight.numel()).view(2, -1)
        probe = probe.to(weight.dtype).to(weight.device)
        expected = module(probe).float()
        actual = reference.rms_norm(probe, weight, eps).float()
    tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
    return eps if torch.allclose(actual, expected, rtol=tolerance, atol=tolerance) else None
