"""Linears that share their input, as one group of LoRA linears where PEFT's state allows it."""

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lora_engine import ops
from lora_engine.errors import EngineWarning, UserError
from lora_engine.models.attach.forwards import (
    ReplacedForward,
    only_argument,
    own_forward,
    uncompiled,
)
from lora_engine.models.attach.patches import Patches
from lora_engine.models.attach.saving import save_apart
from lora_engine.models.attach.seen_linears import Computing, Placed, SeenLinears, place_of
from lora_engine.models.peft import lora_state
from lora_engine.models.peft.lora_state import base_layer, is_lora
from lora_engine.models.peft.router import AdapterRouter
from lora_engine.models.quantized.stored import stored_weight


class LinearGroup:
    """Calls linears that share their input, as `ops.lora_linear` or, failing that, one by one.

    `lora` is the group that `ops.lora_linear` takes; None, and `reason` says why, where the linears
    cannot be one. PEFT's state is looked at on every call: adapters may be switched, disabled or
    merged, and the group takes those that are active. What it cannot stand for runs as the layers'
    own forward: hooks, forwards that others replaced, inputs of another dtype (under autocast),
    autocast to another half precision than the weights', and base weights that were unfrozen,
    exchanged (`load_state_dict(assign=True)`, `functional_call`) or given other storage
    (`model.to(...)`), or another part or order of the same (a slice, a transpose), these with one
    warning.

    dtype: the model's; see `stored_weight`.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        patches: Patches,
        router: AdapterRouter,
        dtype: torch.dtype,
    ) -> None:
        self.modules, self.router = tuple(modules), router
        self.forwards = [module.forward for module in modules]
        self.inside = False  # whether it is called by the forward of its one module
        self._warned = False
        self.reason = lora_state.why_not(modules, dtype) or _why_not_placed(modules, patches)
        self.lora: ops.LoraGroup | None = None
        if self.reason is not None:
            return
        self._adapted = [module for module in modules if is_lora(module)]
        layers = [base_layer(module) for module in modules]
        capacity = lora_state.rank_capacity(modules)
        base = ops.base_of([stored_weight(layer, dtype) for layer in layers], capacity)
        self.lora = ops.LoraGroup(base, [None] * len(layers), capacity=capacity)
        self._placed: list[Placed] = []
        for i, layer in enumerate(layers):
            view = base.weight(i)
            if view is not None:
                patches.set_storage(layer.weight, view)
                save_apart(layer, patches)
            held = layer.weight.detach() if view is None else view
            self._placed.append(Placed(layer, layer.weight, held))
        self._dropout: tuple[float, ...] = ()  # of one element, but where adapters differ
        self._state: tuple[object, ...] | None = None
        self._problem: str | None = None
        self._hookable: list[nn.Module] = []
        self._computing: list[Computing] = []
        self._seen: SeenLinears | None = None

    @property
    def padding_columns(self) -> int:
        """Padding columns the group's input wants behind each row."""
        return self.lora.padded_rank if self.lora is not None else 0

    @property
    def has_lora(self) -> bool:
        """Whether any of the group's linears has adapters."""
        return self.lora is not None and bool(self._adapted)

    def ready(self, x: Tensor) -> bool:
        """Whether `lora` stands for what the layers would compute of `x` now."""
        if self.lora is None or not (self._is_as_seen() or self._look(self.lora)):
            return False
        base = self.lora.base
        return (
            x.dtype == base.dtype
            and not lora_state.hooks_everywhere()
            and not lora_state.autocast_to_another_half(base.device, base.dtype)
        )

    def _is_as_seen(self) -> bool:
        """Whether nothing has changed since `_look` found that `lora` stands for the layers."""
        return self._seen is not None and self._seen.stand(self.router.names)

    def _look(self, lora: ops.LoraGroup) -> bool:
        """Whether `lora` stands for the layers, having been given their adapters."""
        self._seen = None
        for layer, parameter, held in self._placed:
            weight = lora_state.own_tensor(layer, "weight")
            if weight is not parameter or place_of(parameter) != place_of(held):
                self._warn(
                    "the model's weights were moved or exchanged after "
                    "lora_engine.accelerate(model); its linears run as PEFT's own until "
                    "accelerate(model) is called again"
                )
                return False
            if parameter.requires_grad:
                return False
        states = [lora_state.adapter_state(module) for module in self._adapted]
        self._dropout = tuple({p for state in states for p in state.dropout})
        state = (self.router.names, *states)
        if state != self._state:
            self._problem = self._take_adapters(lora)
            self._list_parts()
            self._state = state
        if self._problem is not None or len(self._dropout) > 1 or 1.0 in self._dropout:
            return False
        if are_altered(self._hookable):
            return False
        for part, forward, call in self._computing:
            if type(part).forward is not forward or type(part).__call__ is not call:
                return False
        lora.biases = tuple(layer.bias for layer, _, _ in self._placed)
        self._seen = SeenLinears(
            adapted=self._adapted,
            placed=self._placed,
            computing=self._computing,
            hookable=self._hookable,
            names=self.router.names,
        )
        return True

    def alone(self, x: Tensor) -> ops.LoraGroup | None:
        """`lora` where it is all that the layers compute of inputs like x now, without dropout."""
        return self.lora if self.ready(x) and not any(self._dropout) else None

    def stands_for(self, *modules: nn.Module) -> bool:
        """Whether `modules` are still those that the group was made of, with one warning if not.

        PEFT exchanges them when it is put around an accelerated model, or unloaded.
        """
        same = self.modules == modules
        if not same:
            self._warn(
                "the model's linears were exchanged after lora_engine.accelerate(model); its "
                "layers run as transformers' own until accelerate(model) is called again"
            )
        return same

    def dropout(self) -> ops.Dropout | None:
        """The dropout of the call that was found ready, with a seed drawn from torch's generator.

        None for none.
        """
        if not any(self._dropout):
            return None
        return ops.Dropout(self._dropout[0], int(torch.randint(2**62, ()).item()))

    def routes(self, x: Tensor) -> Tensor | None:
        """The adapter of each of x's rows [...], if rows are routed."""
        return self.router.routes(x.shape[:-1], x.device)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.lora is not None and self.ready(x):
            return ops.lora_linear(x, self.lora, dropout=self.dropout(), routes=self.routes(x))
        if self.router.rows is not None:
            problem = self.reason or self._problem or "its weights were changed, or it has hooks"
            raise UserError(f"rows cannot be routed by adapter through a layer on PEFT: {problem}")
        if self.inside:
            return tuple(forward(x) for forward in self.forwards)
        return tuple(_called(module, x) for module in self.modules)

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(message, EngineWarning, stacklevel=4)

    def _list_parts(self) -> None:
        """Takes note of all parts of the linears that are called, and of what their classes do.

        What only holds others (`nn.ModuleDict`) is not called: it has no forward.
        """
        parts = [part for module in self.modules for part in module.modules()]
        known = {computing.part: computing for computing in self._computing}
        self._computing = [
            known.get(part, Computing(part, type(part).forward, type(part).__call__))
            for part in parts
            if type(part).forward is not nn.Module.forward
        ]
        own = self.modules if self.inside else ()
        self._hookable = [part for part, *_ in self._computing if part not in own]

    def _take_adapters(self, lora: ops.LoraGroup) -> str | None:
        """Gives the active adapters to the group; the reason if that is not possible."""
        for module, (layer, _, _) in zip(self.modules, self._placed, strict=True):
            if base_layer(module) is not layer:
                return "its base layer was exchanged: accelerate anew"
        for module in self._adapted:
            problem = lora_state.why_not_active(module)
            if problem is not None:
                return problem
        adapters = [lora_state.active_factors(m, self.router.names) for m in self.modules]
        if sum(f.lora_a.shape[0] for factors in adapters for f in factors) > lora.padded_rank:
            return "the active adapters have more ranks than were reckoned with: accelerate anew"
        if self.router.names and any(f.bias is not None for factors in adapters for f in factors):
            return "lora_bias=True"
        lora.set_adapters(adapters)
        return None


def _why_not_placed(modules: Iterable[nn.Module], patches: Patches) -> str | None:
    """Why the weights cannot move into a buffer of the group's own, None if they can."""
    if any(patches.places(base_layer(module).weight) for module in modules):
        return "it shares its weight with another layer"
    return None


def _called(module: nn.Module, x: Tensor) -> Tensor:
    """A module's call, in which hooks run; of few rows a plain linear is one product of ours."""
    if type(module) is nn.Linear and not (lora_state.hooks_everywhere() or are_altered([module])):
        y = ops.linear_few_rows(x, module.weight, module.bias)
        if y is not None:
            return y
    result: Tensor = module(x)
    return result


class SingleLinear(ReplacedForward):
    """The forward of a LoRA layer that stands alone."""

    def __init__(self, group: LinearGroup) -> None:
        self.group = group
        group.inside = True

    @uncompiled
    def __call__(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if args or kwargs:  # PEFT's options for this call, such as adapter_names
            result: Tensor = self.group.forwards[0](x, *args, **kwargs)
            return result
        return self.group(x)[0]


class ContiguousInput(ReplacedForward):
    """The forward of a plain linear on parts of a tensor, as of the last token of each row.

    Of an input that is no whole tensor PyTorch makes a batch of products, each with a copy of the
    weight; of few rows, one product that packs the weight.
    """

    def __init__(self, module: nn.Linear) -> None:
        self.module, self.original = module, module.forward

    @uncompiled
    def __call__(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        if x is None:
            x = only_argument(self.original, named)
        y = ops.linear_few_rows(x, self.module.weight, self.module.bias)
        return self.original(x.contiguous()) if y is None else y


def are_altered(modules: Iterable[nn.Module]) -> bool:
    """Whether a call of one of `modules` may do other than its class and its parameters say.

    It has hooks, or someone but us gave it another forward.
    """
    return not all(map(_is_ours, lora_state.altered(modules)))


def _is_ours(module: nn.Module) -> bool:
    """Whether all that is altered about `module` is that its forward is one of this module's."""
    forward = own_forward(module)
    return isinstance(forward, SingleLinear | ContiguousInput) and not lora_state.has_hooks(module)
