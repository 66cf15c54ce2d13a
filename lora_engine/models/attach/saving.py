"""Saving and unloading an accelerated model, for callers that expect contiguous weights.

In an accelerated model frozen weights are views of larger buffers, and not contiguous.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_engine.models.attach.attachment import detach
from lora_engine.models.attach.patches import Patches
from lora_engine.models.families.modules import CausalLm, PeftTuner


def patch_ways_out(model: CausalLm, tuner: PeftTuner | None, patches: Patches) -> None:
    """Makes saving and unloading work as before.

    model: a transformers model. tuner: PEFT's model around it, or None.
    """
    patches.set_attribute(model, "save_pretrained", _SaveContiguous(model))
    for name in ("unload", "merge_and_unload"):
        if hasattr(tuner, name):
            patches.set_attribute(tuner, name, _RestoreFirst(model, getattr(tuner, name)))


def save_apart(module: nn.Module, patches: Patches) -> None:
    """Gives the weight a storage of its own in state dicts, still in the memory of the buffer.

    accelerate takes tensors that share a storage for one, and leaves out all but the first.
    safetensors' `load_model` and `save_model` refuse tensors that are not the whole of a storage:
    they are given copies, which they read names, places and values of, and write nothing into.
    """
    patches.on_undo(module.register_state_dict_post_hook(_apart).remove)


def _apart(
    module: nn.Module, state_dict: dict[str, object], prefix: str, local_metadata: object
) -> None:
    weight = state_dict.get(f"{prefix}weight")
    if not isinstance(weight, Tensor) or isinstance(weight, nn.Parameter):  # as `keep_vars` asks
        return
    storage, size = weight.untyped_storage(), weight.element_size()
    if storage.nbytes() == weight.nbytes:  # somebody moved it
        return
    if _asked_by() == "safetensors.torch":
        state_dict[f"{prefix}weight"] = _whole(weight, state_dict)
        return
    first = weight.storage_offset()
    last = first + sum(
        (n - 1) * step for n, step in zip(weight.shape, weight.stride(), strict=True)
    )
    apart = torch.empty(0, dtype=weight.dtype, device=weight.device)
    part = storage[first * size : (last + 1) * size]
    state_dict[f"{prefix}weight"] = apart.set_(part, 0, weight.shape, weight.stride())


def _whole(weight: Tensor, state_dict: dict[str, object]) -> Tensor:
    """A copy of the weight, the one that the state dict has already where layers are tied."""
    place = weight.data_ptr()
    for other in state_dict.values():
        if isinstance(other, Tensor) and vars(other).get("_copy_of") == place:
            return other
    copied = weight.clone(memory_format=torch.contiguous_format)
    vars(copied)["_copy_of"] = place
    return copied


def _asked_by() -> str | None:
    """The module whose code asked for the state dict that is being made."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals["__name__"] in (__name__, nn.Module.__module__):
        frame = frame.f_back
    name: str | None = frame.f_globals.get("__name__")
    return name


class _RestoreFirst:
    """Takes back what `accelerate` did, then calls the original: it changes the model's modules."""

    def __init__(self, model: nn.Module, original: Callable[..., object]) -> None:
        self.model, self.original = model, original

    def __call__(self, *args: object, **kwargs: object) -> object:
        detach(self.model)
        return self.original(*args, **kwargs)


class _SaveContiguous:
    """`save_pretrained` of a copy of each weight that is not contiguous."""

    def __init__(self, model: CausalLm) -> None:
        self.model, self.original = model, model.save_pretrained

    def __call__(
        self, *args: object, state_dict: dict[str, Tensor] | None = None, **kwargs: object
    ) -> object:
        tensors = self.model.state_dict() if state_dict is None else state_dict
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        return self.original(*args, state_dict=whole, **kwargs)
