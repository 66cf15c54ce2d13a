"""A model while it is looked at, not trained."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lora_engine.models.families.modules import PeftCausalLm
from lora_engine.models.peft.routing import REFERENCE_ADAPTER


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def without_adapters(model: PeftCausalLm) -> Iterator[None]:
    """The PeftModel computes as its base model does; which parameters are trained stays as is."""
    with _keeping_trained(model), model.disable_adapter():
        yield


@contextmanager
def as_reference(model: PeftCausalLm) -> Iterator[None]:
    """The PeftModel computes as what it is compared with: with its adapter REFERENCE_ADAPTER where
    it has one, else without adapters."""
    has_own = REFERENCE_ADAPTER in model.peft_config
    with with_adapter(model, REFERENCE_ADAPTER) if has_own else without_adapters(model):
        yield


@contextmanager
def with_adapter(model: PeftCausalLm, name: str) -> Iterator[None]:
    """The PeftModel computes with one of its adapters alone; which parameters are trained stays."""
    active = list(model.active_adapters)
    with _keeping_trained(model):
        model.base_model.set_adapter(name)
        try:
            yield
        finally:
            model.base_model.set_adapter(active)


@contextmanager
def _keeping_trained(model: nn.Module) -> Iterator[None]:
    """PEFT's switches change which parameters require gradients; here they are put back."""
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
