"""A model's linears in packed bits."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_engine import backends
from lora_engine.errors import UserError, nearest
from lora_engine.models.quantized.linear import QuantizedLinear
from lora_engine.models.quantized.record import record_quantization
from lora_engine.ops import QuantizedWeight, quantize_weight

# Linears that stay as they are: of heads, and those that choose experts.
SKIPPED = ("lm_head", "score", "classifier", "router", "gate", "shared_expert_gate")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # a state dict has names for


def quantize_model(
    model: nn.Module,
    format: str = "nf4",
    *,
    block: int | None = None,
    double_quant: bool = False,
    skip: str | Sequence[str] = SKIPPED,
    device: str | torch.device | None = None,
) -> None:
    """Puts a `QuantizedLinear` in the place of every linear of `model`, one after the other.

    For LoRA over packed weights (QLoRA): quantise, then `peft.get_peft_model`, then `accelerate`.
    format, block, double_quant: see `quantize_weight`. skip: patterns of names, or of their last
    parts, of linears that stay, or one pattern. Norms, embeddings, linears that share an
    embedding's weight, those that the model's class keeps in float32 (`_keep_in_fp32_modules`) and
    what is no `nn.Linear` (GPT-2's `Conv1D`, experts that are one tensor) stay in any case.
    device: where each weight is quantised and kept, one at a time, so that the whole model need
    never be there; None: where it is. Everything else stays where it is.

    Raises UserError for a format, block or device that does not exist, for a pattern that is not of
    SKIPPED and matches no linear, for a model that has adapters, hooks at its linears, or was
    accelerated, where no linear is left to quantise, and, with its name, for a weight that cannot
    be quantised.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"quantize_model: {type(model).__name__} is no model; give the module")
    if device is not None:
        _check_device(device)
    for name, module in model.named_modules():
        if "forward" in vars(module) or hasattr(module, "base_layer"):
            what = f"{name or type(model).__name__} has an adapter or a forward of its own"
            raise UserError(f"quantize_model: {what}; quantise the model before that")
    found = linears_to_quantize(model, skip)
    while found:
        linear = next(iter(found))
        places = found.pop(linear)  # the model's is then the last reference to a dense weight
        packed = _packed(places[0].name, linear, device, format, block, double_quant)
        for place in places:
            setattr(place.parent, place.child, packed)
    record_quantization(model)


def _check_device(device: str | torch.device) -> None:
    try:
        problem = backends.why_absent(torch.device(device))
    except RuntimeError as error:
        raise UserError(
            f"quantize_model: device {device!r} is unknown; use cpu, cuda or cuda:N"
        ) from error
    if problem is not None:
        raise UserError(f"quantize_model: device {str(device)!r} is not here: {problem}")


def _packed(
    name: str,
    linear: nn.Linear,
    device: str | torch.device | None,
    format: str,
    block: int | None,
    double_quant: bool,
) -> QuantizedLinear:
    weight = linear.weight.detach()
    if weight.dtype not in _DTYPES:
        raise UserError(
            f"quantize_model: {name}.weight is {weight.dtype}, "
            "expected float32, bfloat16 or float16: change the model's dtype before"
        )
    if any((linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks)):
        raise UserError(f"quantize_model: {name} has hooks; quantise the model before that")
    quantized = packed_weight(
        name + ".weight",
        weight if device is None else weight.to(device),
        format,
        block,
        double_quant,
    )
    bias = None if linear.bias is None else linear.bias.to(quantized.device)
    return QuantizedLinear(quantized, bias).train(linear.training)


def packed_weight(
    name: str, weight: Tensor, format: str, block: int | None, double_quant: bool
) -> QuantizedWeight:
    """`quantize_weight`, whose errors are UserErrors that name the weight."""
    try:
        return quantize_weight(weight, format, block=block, double_quant=double_quant)
    except ValueError as error:
        raise UserError(f"quantize_model: {name}: {error}") from error


class _Place(NamedTuple):
    """What a linear is part of, its name there, and its whole name."""

    parent: nn.Module
    child: str
    name: str


def linears_to_quantize(
    model: nn.Module, skip: str | Sequence[str]
) -> dict[nn.Linear, list[_Place]]:
    """The linears that `quantize_model` replaces, and where each is."""
    if isinstance(skip, str):
        skip = (skip,)
    if not isinstance(skip, Sequence) or not all(isinstance(pattern, str) for pattern in skip):
        raise UserError(f"quantize_model: skip {skip!r}: expected patterns of names")
    places = [
        (_Place(parent, child, f"{prefix}.{child}" if prefix else child), module)
        for prefix, parent in model.named_modules(remove_duplicate=False)
        for child, module in parent._modules.items()
        if type(module) is nn.Linear
    ]
    names = {place.name: place.child for place, _ in places}
    for pattern in skip:
        matches = any(_matches(name, child, pattern) for name, child in names.items())
        if not matches and pattern not in SKIPPED:
            close = nearest(pattern, {*names, *names.values()})
            hint = f"; did you mean {close}?" if close else ""
            raise UserError(f"quantize_model: skip {pattern!r} matches no linear{hint}")
    head: object = getattr(model, "get_output_embeddings", lambda: None)()
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found: dict[nn.Linear, list[_Place]] = {}
    for place, linear in places:
        stays = (
            linear is head
            or id(linear.weight) in embeddings
            or any(part in kept for part in place.name.split("."))
            or any(_matches(place.name, place.child, pattern) for pattern in skip)
        )
        if not stays:
            found.setdefault(linear, []).append(place)
    if not found:
        where = f"{type(model).__name__} has no linear (nn.Linear) to quantise"
        raise UserError(f"quantize_model: {where}, beside what is skipped or quantised already")
    return found


def _matches(name: str, child: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(child, pattern)
