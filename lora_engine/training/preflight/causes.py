"""Why a model would learn nothing: the messages of `preflight`, and the checks behind them."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_engine.data.batch import PackedBatch
from lora_engine.errors import UserError
from lora_engine.evaluation.nonfinite import first_nonfinite, first_nonfinite_layer
from lora_engine.models.attach.head import transformers_model
from lora_engine.models.peft.routing import is_routed
from lora_engine.models.sharded.linear import is_elsewhere
from lora_engine.training.preflight.trial import Trial

_SUMMED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Place(NamedTuple):
    """What a parameter belongs to.

    adapter: name of its PEFT adapter, or None. kind: PEFT's container that holds it (lora_A, …), or
        "weights". layer: name of the adapted layer; for other parameters that of their module.
    """

    adapter: str | None
    kind: str
    layer: str


def place_of(model: nn.Module, name: str) -> Place:
    adapters = getattr(model, "peft_config", {})
    parts = name.split(".")
    for index in range(len(parts) - 1, 0, -1):
        if parts[index] in adapters:
            return Place(parts[index], parts[index - 1], ".".join(parts[: index - 1]))
    return Place(None, "weights", ".".join(parts[:-1]))


def check_trained(model: nn.Module) -> None:
    """Raises UserError if no parameter requires a gradient, or `model` is no model."""
    if not isinstance(model, nn.Module):
        raise UserError(
            f"preflight: {type(model).__name__} is no model; call it as preflight(model, batch)"
        )
    if any(p.requires_grad for p in model.parameters()):
        return
    layers = [module for module in model.modules() if hasattr(module, "disable_adapters")]
    if any(layer.disable_adapters is True for layer in layers):
        mend = "its adapters are disabled: call model.enable_adapter_layers()"
    elif layers:
        mend = (
            "its adapters are frozen: load them with PeftModel.from_pretrained(…, "
            "is_trainable=True), or choose one with model.set_adapter(name)"
        )
    else:
        mend = "add an adapter with peft.get_peft_model, or set requires_grad on what to train"
    raise UserError(f"preflight: the model has no trainable parameters; {mend}")


@torch.no_grad()
def check_values(model: nn.Module) -> None:
    """Raises UserError where a parameter holds NaN, even if the batch does not use it."""
    for name, parameter in model.named_parameters():
        if parameter.dtype not in _SUMMED or parameter.device.type == "meta":
            continue
        if is_elsewhere(parameter):
            continue
        if not math.isfinite(float(parameter.sum())) and (bad := int(parameter.isnan().sum())):
            raise UserError(
                f"preflight: {name} holds {bad:,} NaN, which the batch does not reach; look at "
                "where its values come from, and set or load them again"
            )


def why_out_of_range(model: nn.Module, trial: Trial) -> str | None:
    """The message for an embedding that is asked for rows beyond its last; None if none is."""
    entered: list[str] = []

    def note(name: str) -> Callable[[nn.Module, object], None]:
        return lambda module, args: entered.append(name)

    def leave(module: nn.Module, args: object, output: object) -> None:
        entered.pop()

    handles = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(note(name)))
            handles.append(module.register_forward_hook(leave))
        trial.loss()
    except IndexError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    embedding = model.get_submodule(entered[-1]) if entered else None
    if not isinstance(embedding, nn.Embedding):
        return None
    return (
        f"preflight: {entered[-1]} has {embedding.num_embeddings:,} rows, and the batch asks for "
        "one beyond; give shorter sequences if these are positions, else ids that it has"
    )


def why_nonfinite(model: nn.Module, trial: Trial, loss: float) -> str:
    """The message for a loss that is not finite."""
    if isinstance(trial.batch, PackedBatch):
        layer = first_nonfinite_layer(model, trial.batch, trial.objective)
    else:
        layer = first_nonfinite(model, lambda: torch.tensor(trial.loss()))
    if trial.has_own_loss and layer in (None, "output head"):
        return (
            f"preflight: the loss is {loss}, and what the model makes of the batch is finite; "
            "look at the loss function"
        )
    where = "" if layer is None else f"; first bad layer {layer}"
    return f"preflight: the loss is {loss}{where}; {_mend_numbers(model)}"


def why_nonfinite_gradient(model: nn.Module, names: Sequence[str]) -> str:
    """The message for gradients that are not finite; names: in the model's order."""
    # Backpropagation runs in the opposite order: the last one was the first to be not finite.
    return (
        f"preflight: the gradient of {names[-1]}{_and_more(len(names) - 1)} is not finite; "
        + _mend_numbers(model)
    )


def why_no_gradient(model: nn.Module, name: str, more: int, gradient: Tensor | None) -> str:
    """The message for a parameter on which the loss depends, whose gradient is None or zero."""
    what = "no gradient" if gradient is None else "a gradient of zero"
    reason = _why_out_of_use(model, place_of(model, name))
    if reason is None and not model.get_parameter(name).requires_grad:
        reason = "the forward pass sets its requires_grad to False"
    if reason is None:
        reason = _why_disconnected(model) if gradient is None else _why_zero(model, name)
    return f"preflight: {name}{_and_more(more)} gets {what}, so that it learns nothing; {reason}"


def why_idle(
    model: nn.Module, trial: Trial, layers: Sequence[list[str]], groups: Sequence[list[str]]
) -> str | None:
    """The message for parameters without a gradient on which the loss does not depend.

    layers: the names of all such parameters, by layer. groups: those adapters (and parameters of
    no adapter) of which all are such, as lists of names. None if the batch explains it: it need
    not reach all layers.
    """
    # PEFT's trainable tokens: the batch need not hold them.
    asked = [at for at in layers if place_of(model, at[0]).kind != "trainable_tokens_delta"]
    own, shaken = _outputs(model, trial, asked)
    for names in asked:
        place = place_of(model, names[0])
        if place.adapter and place.layer in own and own[place.layer] == shaken[place.layer]:
            if (factor := _frozen_at_zero(model, place)) is not None:
                more = _and_more(sum(map(len, layers)) - 1)
                return (
                    f"preflight: {names[0]}{more} gets a gradient of zero, so that it learns "
                    f"nothing; {factor} is zero and frozen: set its requires_grad"
                )
            alone = len(names) < len(_of_layer(model, trial, place))
            what = names[0] if alone else f"adapter {place.adapter!r}"
            return (
                f"preflight: {what} changes nothing in the output of {place.layer}, so that it "
                "learns nothing there; look for another forward"
            )
    reached = {name for names in asked for name in names if place_of(model, name).layer in own}
    for names in groups:
        if reached.intersection(names):
            adapter = place_of(model, names[0]).adapter
            more = _and_more(len(names) - 1)
            what = f"{names[0]}{more}" if adapter is None else f"adapter {adapter!r}"
            return (
                f"preflight: {what} changes nothing in the loss, so that it learns nothing; look "
                "for a mask or a factor of zero behind its layers"
            )
    return None


def why_independent(names: Sequence[str]) -> str:
    """The message where the loss depends on none of `names`, all trained parameters."""
    return (
        f"preflight: the loss depends on nothing that is trained ({names[0]}"
        f"{_and_more(len(names) - 1)}); look whether these layers are called for such a batch, and "
        "whether the loss is computed from what the model returns"
    )


def why_out_of_use(model: nn.Module, names: Sequence[str]) -> str | None:
    """The message where PEFT does not run the adapter of one of these parameters, or None."""
    for name in names:
        reason = _why_out_of_use(model, place_of(model, name))
        if reason is not None:
            more = _and_more(len(names) - 1)
            return f"preflight: {name}{more} changes nothing in the output; {reason}"
    return None


def _why_out_of_use(model: nn.Module, place: Place) -> str | None:
    if place.adapter is None:
        return None
    layer = model.get_submodule(place.layer)
    if getattr(layer, "merged", False):
        return "the adapter is merged into the base weight: call model.unmerge_adapter()"
    if getattr(layer, "disable_adapters", False) is True:
        return "the adapter is disabled: call model.enable_adapter_layers()"
    if place.adapter not in getattr(layer, "active_adapters", [place.adapter]):
        return f"its adapter is not active: call model.set_adapter({place.adapter!r})"
    scaling = getattr(layer, "scaling", None)
    if isinstance(scaling, dict) and scaling.get(place.adapter) == 0:
        return "its scaling is 0: give lora_alpha another value"
    return None


def _why_disconnected(model: nn.Module) -> str:
    if any(map(_checkpoints_reentrantly, model.modules())):
        return (
            "gradient checkpointing is reentrant and its inputs require no gradient: call "
            "model.enable_input_require_grads(), or pass use_reentrant=False"
        )
    return (
        "something between it and the loss cuts it off: look for detach(), .data, no_grad or "
        "inference_mode"
    )


def _checkpoints_reentrantly(module: nn.Module) -> bool:
    function = getattr(module, "_gradient_checkpointing_func", None)
    if not getattr(module, "gradient_checkpointing", False) or function is None:
        return False
    options = function.keywords if isinstance(function, functools.partial) else {}
    return bool(options.get("use_reentrant", True))


def _why_zero(model: nn.Module, name: str) -> str:
    place = place_of(model, name)
    if place.kind.startswith("lora_"):
        factors = list(_factors(model, place).values())
        if len(factors) > 1 and not any(bool(p.detach().any()) for p in factors):
            return "A and B of its layer are both zero: initialise one of them"
    if any(p.dtype == torch.float16 for p in model.parameters()):
        return "it vanishes in float16: load the model in bfloat16 or float32"
    return "look for a factor of zero, a hook on gradients, or rounding, between it and the loss"


def _factors(model: nn.Module, place: Place) -> dict[str, nn.Parameter]:
    """A and B of an adapter of LoRA in a layer, by name."""
    return {
        name: p
        for name, p in model.named_parameters()
        if (at := place_of(model, name))[::2] == place[::2]
        and at.kind.startswith("lora_")
        and "magnitude" not in at.kind
    }


def _frozen_at_zero(model: nn.Module, place: Place) -> str | None:
    """The name of the layer's A or B that is frozen at zero, so that the other cannot learn."""
    for name, factor in _factors(model, place).items():
        if not factor.requires_grad and not bool(factor.detach().any()):
            return name
    return None


def _of_layer(model: nn.Module, trial: Trial, place: Place) -> list[str]:
    """The trained parameters of the place's layer and adapter."""
    return [name for name in trial.trained if place_of(model, name)[::2] == place[::2]]


def _outputs(
    model: nn.Module, trial: Trial, parameters: Sequence[list[str]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Sum of the outputs' absolute values, by layer, for the layers of these parameters that ran:
    with noise on what else is trained of them (A does nothing while B is 0), and on these too."""
    at = {place_of(model, together[0]).layer for together in parameters}
    layers = {name: model.get_submodule(name) for name in at}
    names = dict.fromkeys(name for together in parameters for name in together)
    others = [n for n in trial.trained if place_of(model, n).layer in at and n not in names]
    batch = trial.batch
    if isinstance(batch, PackedBatch):
        # Layers with routed rows, and the head, refuse to run watched; see `first_nonfinite_layer`.
        if is_routed(model, batch):
            return {}, {}
        head = transformers_model(model).get_output_embeddings()
        parts = set() if head is None else set(head.modules())
        layers = {name: module for name, module in layers.items() if module not in parts}
    figures = []
    for changed in (others, [*others, *names]):  # with the same noise on the others
        trial.shake(changed)
        with _watched(layers) as sums:
            trial.loss()
        figures.append(sums)
    trial.reset()
    return figures[0], figures[1]


@contextmanager
def _watched(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, float]]:
    """Collects the sum of the absolute values of each layer's outputs, by layer."""
    sums: dict[str, float] = {}

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def note(module: nn.Module, args: object, output: object) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, Tensor) and tensor.numel():
                sums[name] = sums.get(name, 0.0) + float(tensor.detach().double().abs().sum())

        return note

    handles = []
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_hook(watch(name)))
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _mend_numbers(model: nn.Module) -> str:
    if any(p.dtype == torch.float16 for p in model.parameters()):
        return "float16 ends at 65,504: load the model in bfloat16 or float32"
    return "look at the weights before it and at the batch"


def _and_more(count: int) -> str:
    return f" (and {count:,} more)" if count else ""
