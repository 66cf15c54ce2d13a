"""Linear heads to take a cross-entropy of, ours and as people write it in PyTorch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_engine.ops import LoraFactors
from lora_engine.ops import linear_cross_entropy as function

SCALING = 1.5
EXTRAS: dict[str, Any] = {"label_smoothing": 0.2, "softcap": 6.0, "z_loss": 0.01}


def peer(target: Tensor, reduction: str, **extras: Any):
    """As people write it in PyTorch: hidden, weight, and if given bias, lora_a and lora_b."""

    def loss(hidden: Tensor, weight: Tensor, *more: Tensor) -> Tensor:
        bias = more[0] if len(more) in (1, 3) else None
        z = F.linear(hidden, weight, bias)
        if len(more) > 1:
            a, b = (x.to(hidden.dtype) for x in more[-2:])
            z = z + SCALING * F.linear(F.linear(hidden, a), b)
        z = z if z.dtype == torch.float64 else z.float()
        if extras.get("softcap"):
            z = extras["softcap"] * torch.tanh(z / extras["softcap"])
        smoothing = extras.get("label_smoothing", 0.0)
        rows = F.cross_entropy(z, target, reduction="none", label_smoothing=smoothing)
        squares = extras.get("z_loss", 0.0) * torch.logsumexp(z, -1) ** 2
        rows = rows + squares * (target != -100)
        if reduction == "none":
            return rows
        return rows.sum() / ((target != -100).sum().clamp(min=1) if reduction == "mean" else 1)

    return loss


def ours(target: Tensor, reduction: str, impl: str | None = None, **options: Any):
    def loss(hidden: Tensor, weight: Tensor, *more: Tensor) -> Tensor:
        bias = more[0] if len(more) in (1, 3) else None
        lora = LoraFactors(*more[-2:], SCALING) if len(more) > 1 else None
        return function(
            hidden,
            weight,
            target,
            reduction=reduction,
            impl=impl,
            bias=bias,
            lora=lora,
            **options,
        ).loss

    return loss


def case(rows: int, classes: int, dtype: torch.dtype, parts: str, width: int = 24) -> list[Tensor]:
    """hidden, weight and what `parts` names of bias and LoRA (adapters in float32, as PEFT's)."""
    shapes = {"hidden": (rows, width), "weight": (classes, width)}
    if "bias" in parts:
        shapes["bias"] = (classes,)
    if "lora" in parts:
        shapes |= {"a": (3, width), "b": (classes, 3)}
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if "lora" in parts:
        made["a"], made["b"] = made["a"] * 0.2, made["b"] * 0.5
    return [x.to(dtype) for x in made.values()]


def targets(rows: int, classes: int) -> Tensor:
    target = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(1))
    target[2:10] = -100
    return target


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()
