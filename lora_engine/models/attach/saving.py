"""Saving and unloading an accelerated model, for callers that expect contiguous weights.

In an accelerated model frozen weights are views of larger buffers, and not contiguous.
"""

from collections.abc import Callable

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
