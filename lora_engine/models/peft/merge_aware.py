"""Merge-aware training: a LoRA adapter learns over the weights that it will be served merged into.

The frozen base stays as it is, and every product is made with Q(W + s B A), the merged weight in
packed bits; A and B get straight-through gradients (see `ops.mergeable_weight`). Without it an
adapter that was trained beside its base loses a part of what it learned when merged weights are
quantised.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lora_engine.errors import UserError
from lora_engine.models.attach.attachment import attachment
from lora_engine.models.attach.head import transformers_model
from lora_engine.models.families.modules import LoraLinear
from lora_engine.models.peft.lora_state import active_factors, is_lora, is_saved_whole
from lora_engine.models.peft.straight_through import StraightThrough
from lora_engine.models.quantized.linear import QuantizedLinear
from lora_engine.models.quantized.merge_aware_linear import MergeAwareLinear
from lora_engine.models.quantized.quantize import (
    SKIPPED,
    linears_to_quantize,
    packed_weight,
)
from lora_engine.ops import LoraFactors
from lora_engine.quantization.formats import writable_format


def make_merge_aware(
    model: nn.Module,
    format: str = "nf4",
    *,
    double_quant: bool = False,
    skip: str | Sequence[str] = SKIPPED,
    dtype: torch.dtype | None = None,
) -> None:
    """Lets the LoRA adapter of a PeftModel learn over its merged weights in packed bits.

    After `peft.get_peft_model`, before `accelerate`. format, double_quant: as `quantize_weight`
    takes them; skip: as `quantize_model`. Linears that the adapter adapts keep W, and compute with
    Q(W + s B A); the others are put into the format. Evaluation and generation use the same
    weights; with the adapter disabled, Q(W). Adapters that are loaded later need another call.
    dtype: what sums are rounded to before they are quantised; None: that of W.

    Raises UserError for a model that has no LoRA layers or was accelerated, for what cannot be
    merged into packed bits (DoRA and other variants, dropout, adapters of embeddings or of linears
    that `skip` leaves out, linears trained in full), and for what `quantize_model` refuses.
    """
    inner = transformers_model(model)
    layers = [(name, module) for name, module in inner.named_modules() if is_lora(module)]
    if not layers:
        raise UserError("merge-aware training: the model has no LoRA layers; add the adapter first")
    if attachment(inner) is not None:
        raise UserError("merge-aware training: the model is accelerated; do this before accelerate")
    try:
        wanted = writable_format(format, None, double_quant)
    except ValueError as error:
        raise UserError(f"merge-aware training: {error}") from error
    with _as_base_model(inner) as wrapped:
        again = all(isinstance(module.get_base_layer(), MergeAwareLinear) for _, module in layers)
        found = {} if again else linears_to_quantize(inner, skip)
    for name, module in layers:
        problem = _why_not(module)
        base = module.get_base_layer()
        if problem is None and base not in found and not isinstance(base, MergeAwareLinear):
            problem = "stays out of packed bits; leave it out of target_modules"
        if problem is not None:
            raise UserError(f"merge-aware training: {name} {problem}")
    for name, around in wrapped:
        if not is_lora(around) and (not is_saved_whole(around) or around.original_module in found):
            raise UserError(
                f"merge-aware training: {name} is trained otherwise than by LoRA on a linear, and "
                "would not be merged into packed bits; leave it out of target_modules and "
                "modules_to_save"
            )
    adapted = {id(module.get_base_layer()) for _, module in layers}
    for linear, places in found.items():
        if id(linear) in adapted:
            continue
        packed = packed_weight(
            f"{places[0].name}.weight",
            linear.weight.detach().to(dtype or linear.weight.dtype),
            *(format, None, double_quant),
        )
        for place in places:
            setattr(place.parent, place.child, QuantizedLinear(packed, linear.bias))
    for _, module in layers:
        base = module.get_base_layer()
        if not isinstance(base, MergeAwareLinear):
            module.base_layer = MergeAwareLinear(
                base, wanted, dtype or base.weight.dtype, partial(_active, module)
            )
        for name in module.lora_A:
            module.lora_variant[name] = StraightThrough()  # type: ignore[index]


def _active(layer: nn.Module) -> list[LoraFactors]:
    """The factors of the layer's adapters that run now."""
    factors = active_factors(layer, ())
    if len(factors) > 1:
        raise UserError(
            "merge-aware training: several adapters are active at once; a weight is merged with one"
        )
    return factors


def _why_not(layer: LoraLinear) -> str | None:
    """Why a LoRA layer's adapters cannot be merged into packed bits; None if they can."""
    if any(not isinstance(variant, StraightThrough) for variant in layer.lora_variant.values()):
        return "has DoRA or another variant of LoRA; use plain LoRA"
    if any(getattr(dropout, "p", 0.0) > 0 for dropout in layer.lora_dropout.values()):
        return "has lora_dropout, and what is served has none; set lora.dropout to 0"
    if any(isinstance(scaling, Tensor) for scaling in layer.scaling.values()):
        return "has a scaling that is a tensor; use plain LoRA"
    if layer.fan_in_fan_out or any(layer.lora_bias.values()):
        return "has lora_bias or fan_in_fan_out; use plain LoRA"
    if layer.merged:
        return "is merged; unmerge it first"
    if layer.get_base_layer().weight.requires_grad:
        return "is trained beside its adapter; freeze its weight"
    return None


@contextmanager
def _as_base_model(model: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """Within, the linears that PEFT wrapped stand where they stood in the base model.

    Yields all that PEFT put around modules, by name.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapped: list[tuple[str, nn.Module]] = []
    places: list[tuple[nn.Module, str, nn.Module]] = []
    for prefix, parent in list(model.named_modules()):
        for child, module in list(parent._modules.items()):
            if isinstance(module, BaseTunerLayer) or is_saved_whole(module):
                assert module is not None
                wrapped.append((f"{prefix}.{child}" if prefix else child, module))
                places.append((parent, child, module))
    for parent, child, module in places:
        saved = is_saved_whole(module)
        parent._modules[child] = module.original_module if saved else module.base_layer  # type: ignore[assignment]
    try:
        yield wrapped
    finally:
        for parent, child, module in places:
            parent._modules[child] = module
