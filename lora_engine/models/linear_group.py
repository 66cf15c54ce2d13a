"""Linears that share their input, as one augmented weight where PEFT's state allows it."""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine import ops
from lora_engine.models.patches import Patches


class LinearGroup:
    """Calls linears that share their input, as `ops.lora_linear` or, failing that, one by one.

    `reason` says why there is no augmented weight, or is None. PEFT may change a layer after this
    was made (disable, merge or switch its adapters): then the layers' own forwards run, which see
    that. Weights that were given other storage (`model.to(...)`) do too, with one warning.
    """

    def __init__(self, modules: Sequence[nn.Module], patches: Patches) -> None:
        self.forwards = [module.forward for module in modules]
        self.reason = _why_not(modules)
        self.weight: ops.AugmentedWeight | None = None
        if self.reason is not None:
            return
        self._adapted = [module for module in modules if is_lora(module)]
        self._state = [adapter_state(module) for module in self._adapted]
        bases = [_base(module) for module in modules]
        self.weight = ops.AugmentedWeight(
            [base.weight for base in bases],
            [lora_factors(module) for module in modules],
            [base.bias for base in bases],
        )
        self._bases = [(base.weight, self.weight.weight(i)) for i, base in enumerate(bases)]
        for parameter, view in self._bases:
            patches.set_storage(parameter, view)

    @property
    def tail(self) -> int:
        """Spare columns the group's input wants behind each row."""
        return self.weight.tail if self.weight is not None else 0

    @property
    def has_lora(self) -> bool:
        """Whether the augmented weight holds an adapter."""
        return self.weight is not None and bool(self._adapted)

    def current(self) -> bool:
        """Whether the augmented weight stands for what the layers would compute."""
        if self.weight is None:
            return False
        if any(parameter.data_ptr() != view.data_ptr() for parameter, view in self._bases):
            _warn_moved()
            return False
        return self._state == [adapter_state(module) for module in self._adapted]

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.weight is not None and self.current():
            return ops.lora_linear(x, self.weight)
        return tuple(forward(x) for forward in self.forwards)


@cache
def _warn_moved() -> None:
    warnings.warn(
        "the model's weights were moved after lora_engine.accelerate(model); its linears run as "
        "PEFT's own until accelerate(model) is called again",
        stacklevel=3,
    )


def is_lora(module: nn.Module) -> bool:
    """Whether `module` is PEFT's LoRA layer around a plain linear."""
    import peft

    return isinstance(module, peft.tuners.lora.Linear)


def is_linear(module: Any) -> bool:
    """Whether `module` is a plain linear or PEFT's LoRA layer."""
    return type(module) is nn.Linear or (isinstance(module, nn.Module) and is_lora(module))


def _base(module: Any) -> Any:
    base: nn.Linear = module.get_base_layer() if is_lora(module) else module
    return base


def adapter_state(module: Any) -> tuple[Any, ...]:
    """What decides which of a PEFT layer's adapters run."""
    active = tuple(name for name in module.active_adapters if name in module.lora_A)
    return module.disable_adapters, module.merged, active, tuple(module.scaling[a] for a in active)


def lora_factors(module: Any) -> ops.LoraFactors | None:
    """The active adapter of a PEFT layer; None for another layer, or where none is active."""
    if not is_lora(module):
        return None
    _, _, active, _ = adapter_state(module)
    if not active:
        return None
    name = active[0]
    return ops.LoraFactors(
        module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
    )


def _why_not(modules: Sequence[nn.Module]) -> str | None:
    for module in modules:
        if not is_linear(module):
            return f"{type(module).__name__} is not a linear layer"
        base = _base(module)
        if type(base) is not nn.Linear:
            return f"the base layer is {type(base).__name__}, not nn.Linear"
        if base.weight.requires_grad:
            return "the base weight is trained"
        if base.weight.dtype not in (torch.float32, torch.bfloat16, torch.float64):
            return f"the base weight is {base.weight.dtype}"
        if is_lora(module):
            problem = why_not_lora(module)
            if problem is not None:
                return problem
    return None


def why_not_lora(module: Any) -> str | None:
    """Why a PEFT layer's state is not `W + scaling B A`, or None."""
    disabled, merged, active, _ = adapter_state(module)
    if disabled or merged:
        return "the adapter is disabled or merged"
    if len(active) > 1:
        return "several adapters are active at once"
    for name in active:
        if name in module.lora_variant:
            return f"the variant {type(module.lora_variant[name]).__name__} of LoRA"
        if getattr(module.lora_dropout[name], "p", 0.0) > 0:
            return "lora_dropout > 0"
        if module.lora_bias[name]:
            return "lora_bias=True"
    if module.fan_in_fan_out:
        return "fan_in_fan_out=True"
    return None
