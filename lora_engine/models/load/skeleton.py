"""A model without weights, to be filled tensor by tensor."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_engine.models.load.transformers_files import quiet_transformers


class Place(NamedTuple):
    """A module, the name it has there, and its or its tensor's whole name."""

    parent: nn.Module
    child: str
    name: str


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """A transformers causal language model whose parameters are on meta, in `dtype`.

    Buffers are there as the model's constructor makes them. Parameters that share a tensor do so
    already, and those that the class keeps in float32 are float32, as from_pretrained has them.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with quiet_transformers(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if kept and dtype != torch.float32:
        for name, parameter in model.named_parameters():
            if kept & set(name.split(".")):
                parameter.data = parameter.data.float()
    return model


def places(model: nn.Module, module: nn.Module) -> list[Place]:
    """Everywhere in the model that `module` is."""
    return [
        Place(parent, child, f"{prefix}.{child}" if prefix else child)
        for prefix, parent in model.named_modules(remove_duplicate=False)
        for child, of in parent._modules.items()
        if of is module
    ]


def tensors(model: nn.Module) -> Iterator[tuple[Place, Tensor]]:
    """Parameters and the buffers that state dicts have, each once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        transient = module._non_persistent_buffers_set
        own = {**module._parameters, **module._buffers}
        for child, tensor in own.items():
            if tensor is not None and child not in transient and id(tensor) not in seen:
                seen.add(id(tensor))
                yield Place(module, child, f"{prefix}.{child}" if prefix else child), tensor


def put(place: Place, expected: Tensor, value: Tensor) -> None:
    """Makes `value` the tensor at `place`, of the kind and dtype that `expected` has there."""
    value = value.to(expected.dtype)
    if place.child in place.parent._parameters:
        place.parent._parameters[place.child] = nn.Parameter(value, expected.requires_grad)
    else:
        place.parent._buffers[place.child] = value
