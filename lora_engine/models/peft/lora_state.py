"""What PEFT's LoRA layers are doing at the moment, and whether a group of ours can do it."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from types import FunctionType
from typing import Literal, NamedTuple, TypeAlias, TypeGuard, cast

import torch
from torch import nn

from lora_engine import ops
from lora_engine.models.attach.capture import is_idle
from lora_engine.models.families.modules import LoraLinear, SavedWhole
from lora_engine.models.peft.straight_through import StraightThrough
from lora_engine.models.peft.watch import Watch
from lora_engine.models.quantized.merge_aware_linear import MergeAwareLinear
from lora_engine.models.quantized.stored import is_plain_linear, stored_weight, why_not_stored

# The number of an adapter that no row is routed to; rows without an adapter have -1.
UNROUTED = -2


def is_lora(module: nn.Module) -> TypeGuard[LoraLinear]:
    """Whether `module` is PEFT's LoRA layer around a plain linear."""
    import peft

    # PEFT's classes for bitsandbytes' linears, if anything has asked PEFT for them.
    of_bitsandbytes = sys.modules.get("peft.tuners.lora.bnb")
    in_4bit = getattr(of_bitsandbytes, "Linear4bit", None)
    in_8bit = getattr(of_bitsandbytes, "Linear8bitLt", None)
    return isinstance(module, (peft.tuners.lora.Linear, *filter(None, (in_4bit, in_8bit))))


def is_saved_whole(module: nn.Module) -> TypeGuard[SavedWhole]:
    """Whether `module` is PEFT's wrapper around a module that is trained in full."""
    from peft.utils.other import ModulesToSaveWrapper

    return isinstance(module, ModulesToSaveWrapper)


def is_linear(module: object) -> TypeGuard[nn.Linear | LoraLinear]:
    """Whether `module` is a plain linear or PEFT's LoRA layer."""
    return is_plain_linear(module) or (isinstance(module, nn.Module) and is_lora(module))


def base_layer(module: nn.Module) -> nn.Linear:
    """The linear inside a LoRA layer, or `module` itself; a module of `is_linear`."""
    if is_lora(module):
        return module.get_base_layer()
    assert isinstance(module, nn.Linear)
    return module


def has_hooks(module: nn.Module) -> bool:
    """Whether someone watches or changes the module's calls (PEFT does, for `adapter_names`)."""
    return _has_own_hooks(module) or hooks_everywhere()


def any_has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether `has_hooks` is true of one of the modules."""
    return hooks_everywhere() or any(map(_has_own_hooks, modules))


def hooks_everywhere() -> bool:
    """Whether someone watches the calls of all modules (`register_module_forward_hook`)."""
    return torch.nn.modules.module._has_any_global_hook()


def altered(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of which a call may do other than their classes and their parameters say.

    They have hooks, or somebody gave them a forward of their own. A step asks of hundreds: no call
    for each.
    """
    return [
        module
        for module in modules
        if module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in vars(module)
    ]


def _has_own_hooks(module: nn.Module) -> bool:
    if module._forward_pre_hooks or module._backward_pre_hooks or module._backward_hooks:
        return True
    hooks = module._forward_hooks
    return bool(hooks) and not all(map(is_idle, hooks.values()))


def autocast_to_another_half(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `torch.autocast` computes in float16 where weights are bfloat16, or the reverse.

    Modules that are left as they were then produce autocast's dtype, which our products with the
    weights cannot take.
    """
    if not torch.is_autocast_enabled(device.type):
        return False
    return {dtype, torch.get_autocast_dtype(device.type)} == {torch.float16, torch.bfloat16}


class AdapterState(NamedTuple):
    """What decides which of a LoRA layer's adapters run, and how.

    dropout: the probabilities with which their inputs are dropped.
    """

    dropout: tuple[float, ...]
    rest: tuple[object, ...]


def adapter_state(module: LoraLinear) -> AdapterState:
    """The layer's state at this moment."""
    disabled, merged = module.disable_adapters, bool(module.merged)
    lora_a, lora_b = _parts(module, "lora_A"), _parts(module, "lora_B")
    dropouts = _parts(module, "lora_dropout")
    state: list[object] = [disabled, merged, id(module._modules["base_layer"])]
    dropped = []
    for name in [] if disabled or merged else module.active_adapters:
        if name not in lora_a:
            continue
        a, b, dropout = lora_a[name], lora_b[name], dropouts[name]
        scaling, magnitude = module.scaling[name], _magnitude(module, name)
        a_weight, b_weight = own_tensor(a, "weight"), own_tensor(b, "weight")
        state += [
            name,
            id(scaling) if isinstance(scaling, torch.Tensor) else scaling,
            id(a),
            id(b),
            id(dropout),
            id(a_weight),
            id(b_weight),
            None if a_weight is None else a_weight.shape,  # a parameter may be given other data
            None if b_weight is None else b_weight.shape,
            id(own_tensor(a, "bias")),
            id(own_tensor(b, "bias")),
            id(magnitude),
        ]
        dropped.append(vars(dropout).get("p", 0.0) if dropout.training else 0.0)
    return AdapterState(tuple(dropped), tuple(state))


def switches(module: LoraLinear) -> tuple[bool, bool, tuple[str, ...]]:
    """Whether the layer's adapters are disabled or merged, and which are active."""
    return module.disable_adapters, module.merged, tuple(module.active_adapters)


def watch_adapters(watch: Watch, module: LoraLinear) -> None:
    """Has `watch` hold for as long as the layer's `adapter_state` stays, its `switches` given.

    The shapes of factors are not watched: a parameter may be given other data.
    """
    watch.attributes(module, "_modules", "scaling", "lora_variant")
    parts = module._modules
    for part in ("base_layer", *_PARTS):
        watch.item(parts, part)
    for part in _PARTS:
        watch.attributes(_held(module, part), "_modules")
    for name in module.active_adapters:
        for part in _PARTS:
            watch.item(_parts(module, part), name)
        if name not in _parts(module, "lora_A"):
            continue
        a, b, dropout = (_parts(module, part)[name] for part in _PARTS)
        watch_tensors(watch, a)
        watch_tensors(watch, b)
        watch.attributes(dropout, "p", "training")
        watch.item(module.scaling, name)
        watch.item(module.lora_variant, name)
        if _magnitude(module, name) is not None:
            magnitudes = _held(module, "lora_magnitude_vector")
            watch.item(parts, "lora_magnitude_vector")
            watch.attributes(magnitudes, "_modules")
            watch.item(magnitudes._modules, name)
            watch_tensors(watch, _held(magnitudes, name))


_Part: TypeAlias = Literal["lora_A", "lora_B", "lora_dropout"]
_PARTS: tuple[_Part, ...] = ("lora_A", "lora_B", "lora_dropout")


def _parts(module: LoraLinear, part: _Part) -> Mapping[str, nn.Module]:
    """What a layer has of each adapter, by the adapters' names.

    Read past nn.Module's __getattr__, which takes longer.
    """
    return cast("Mapping[str, nn.Module]", _held(module, part)._modules)


def _held(module: nn.Module, name: str) -> nn.Module:
    """A module's submodule."""
    part = module._modules[name]
    assert part is not None
    return part


def own_tensor(layer: nn.Module, name: Literal["weight", "bias"]) -> torch.Tensor | None:
    """A layer's parameter, or the tensor that stands in its place; None where it has neither.

    Not what it computes under that name: spectral norm takes a step whenever it is asked.
    """
    parameters = layer._parameters
    if name in parameters:
        return parameters[name]
    instead: torch.Tensor | None = (
        vars(layer).get("weight") if name == "weight" else vars(layer).get("bias")
    )
    return instead


def watch_tensors(watch: Watch, layer: nn.Module) -> None:
    """Has `watch` hold for as long as `own_tensor` finds what it finds now."""
    watch.attributes(layer, "_parameters", "weight", "bias")
    watch.item(layer._parameters, "weight")
    watch.item(layer._parameters, "bias")


def rank_capacity(modules: Sequence[nn.Module]) -> int:
    """The ranks to keep place for: of all active adapters, or of the largest other one."""
    adapted = [module for module in modules if is_lora(module)]
    names = {name for module in adapted for name in module.r}
    each = [sum(module.r.get(name, 0) for module in adapted) for name in names]
    active = sum(module.r[name] for module in adapted for name in _active(module))
    return max([active, *each])


def active_factors(module: nn.Module, names: Sequence[str]) -> list[ops.LoraFactors]:
    """The adapters of a linear that run now, numbered by their place in `names`."""
    if not is_lora(module):
        return []
    factors = []
    for name in _running(module):
        lora_b, bias = _lora_b(module, name)
        factors.append(
            ops.LoraFactors(
                lora_a=module.lora_A[name].weight,
                lora_b=lora_b,
                scaling=module.scaling[name],
                magnitude=_magnitude(module, name),
                adapter=names.index(name) if name in names else UNROUTED,
                bias=bias,
            )
        )
    return factors


def running_factors(module: LoraLinear) -> list[torch.Tensor]:
    """A and B of the adapters that run now."""
    return [
        part[name].weight for name in _running(module) for part in (module.lora_A, module.lora_B)
    ]


def why_not(modules: Sequence[nn.Module], dtype: torch.dtype) -> str | None:
    """Why linears cannot be one group; None if they can. dtype: see `stored_weight`."""
    for module in modules:
        if not is_linear(module):
            return f"{type(module).__name__} is not a linear layer"
        base = base_layer(module)
        problem = why_not_stored(base)
        if problem is not None:
            return problem
        if base.weight.requires_grad:
            return "the base weight is trained"
        if not ops.has_base([stored_weight(base, dtype)]):
            return f"the base weight is {base.weight.dtype}"
        if any("forward" in vars(part) for part in module.modules()):
            return "someone gave it, or a part of it, another forward"
        if is_lora(module):
            problem = why_not_active(module)
            if problem is not None:
                return problem
    if not ops.has_base([stored_weight(base_layer(module), dtype) for module in modules]):
        return "their weights are not stored alike"
    probabilities = {
        getattr(module.lora_dropout[name], "p", 0.0)
        for module in modules
        if is_lora(module)
        for name in _active(module)
    }
    if len(probabilities) > 1:
        return f"adapters of the group have different dropout: {sorted(probabilities)}"
    return None


def why_not_active(module: LoraLinear) -> str | None:
    """Why the active adapters of a LoRA layer cannot be part of a group."""
    if module.disable_adapters and module.merged:
        return "the adapter is disabled but merged: PEFT takes it out of the weight"
    forward: object = type(module).forward
    if not isinstance(forward, FunctionType) or not _is_peft_s(forward):
        return f"the forward of {type(module).__name__} is not PEFT's"
    active = _running(module)
    for name in active:
        problem = _why_not_as_peft_makes(module, name)
        if problem is not None:
            return problem
        merges = isinstance(base_layer(module), MergeAwareLinear)
        if merges != is_straight_through(module, name):
            return "it is merge-aware, and one of its adapters is not"
        if merges and len(active) > 1:
            return "several adapters are active at once, over a weight that is merged with one"
        if name in module.lora_variant and not merges:
            variant = type(module.lora_variant[name]).__name__
            if variant != "DoraLinearVariant":
                return f"the variant {variant} of LoRA"
            if getattr(module.lora_dropout[name], "p", 0.0) > 0:
                return "DoRA with lora_dropout > 0"
            if len(active) > 1:
                return "several adapters are active at once, one of them DoRA"
    if module.fan_in_fan_out:
        return "fan_in_fan_out=True"
    return None


def is_straight_through(module: LoraLinear, name: str) -> bool:
    """Whether an adapter is merged into its layer's weight: see `merge_aware`."""
    return isinstance(module.lora_variant.get(name), StraightThrough)


def _is_peft_s(function: FunctionType) -> bool:
    """Whether a function stands in PEFT's own files, whatever it was given as name and module."""
    name: str = function.__globals__["__name__"]
    return name.partition(".")[0] == "peft"


def _why_not_as_peft_makes(module: LoraLinear, name: str) -> str | None:
    """Why an adapter may compute something else than B A dropout(x); None if it may not."""
    for part in (module.lora_A[name], module.lora_B[name]):
        if type(part) is not nn.Linear:
            return f"a factor of {name} is {type(part).__name__}, not nn.Linear"
    if module.lora_A[name].bias is not None:
        return f"lora_A of {name} has a bias"
    dropout = module.lora_dropout[name]
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return f"the dropout of {name} is {type(dropout).__name__}, not nn.Dropout"
    return None


def _lora_b(module: LoraLinear, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An adapter's B, and its bias where PEFT's `lora_bias` gives it one."""
    return module.lora_B[name].weight, module.lora_B[name].bias


def _magnitude(module: LoraLinear, name: str) -> torch.Tensor | None:
    """An adapter's magnitudes where it is DoRA."""
    if name not in module.lora_variant or is_straight_through(module, name):
        return None
    magnitude: torch.Tensor = module.lora_magnitude_vector[name].weight
    return magnitude


def _active(module: LoraLinear) -> list[str]:
    known = _parts(module, "lora_A")
    return [name for name in module.active_adapters if name in known]


def _running(module: LoraLinear) -> list[str]:
    """The adapters whose product is computed; merged ones are in the base weight already."""
    return [] if module.disable_adapters or module.merged else _active(module)
