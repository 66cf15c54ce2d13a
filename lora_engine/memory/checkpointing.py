"""A checkpointing policy put into force on a model's layers.

Losses and gradients are bitwise those without: a layer's second run has the same inputs, the same
dropout and the same adapters.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_engine.errors import UserError
from lora_engine.memory.offload import ActivationStore
from lora_engine.memory.policy import Policy, policy_of
from lora_engine.models.attach.decoder_layer import DecoderLayerForward
from lora_engine.models.attach.forwards import own_forward
from lora_engine.models.attach.head import transformers_model
from lora_engine.models.families.modules import DecoderLayer


@contextmanager
def checkpointing(
    model: nn.Module, policy: str | Policy | None, store: ActivationStore | None = None
) -> Iterator[None]:
    """Within, `model`'s layers follow `policy` in training; None leaves them as they are.

    model: of transformers, plain, with PEFT's adapters or accelerated. store: keeps the inputs of
    what runs again; None: memory does. The layers are what they were afterwards. Raises UserError
    where they cannot follow it, ValueError for an unknown one.
    """
    if policy is None:
        yield
        return
    policy = policy_of(policy) if isinstance(policy, str) else policy
    layers = _layers(model, policy)
    run = partial(checkpoint, use_reentrant=False) if store is None else store.checkpoint
    before = [_state(layer) for layer in layers]
    try:
        for index, layer in enumerate(layers):
            layer.gradient_checkpointing = policy.covers(index)
            layer._gradient_checkpointing_func = run
            forward = own_forward(layer)
            if isinstance(forward, DecoderLayerForward):
                forward.keeps, forward.tile = policy.keeps, policy.tile
        yield
    finally:
        for layer, (on, function) in zip(layers, before, strict=True):
            layer.gradient_checkpointing = on
            if function is None:
                vars(layer).pop("_gradient_checkpointing_func", None)
            else:
                layer._gradient_checkpointing_func = function
            forward = own_forward(layer)
            if isinstance(forward, DecoderLayerForward):
                forward.keeps, forward.tile = "input", 0


def can_follow(model: nn.Module, policy: str) -> bool:
    """Whether the model's layers can follow the policy."""
    try:
        _layers(model, policy_of(policy))
    except UserError:
        return False
    return True


def _state(layer: DecoderLayer) -> tuple[bool, Callable[..., Tensor] | None]:
    return layer.gradient_checkpointing, vars(layer).get("_gradient_checkpointing_func")


def _layers(model: nn.Module, policy: Policy) -> list[DecoderLayer]:
    """The model's decoder layers. Raises UserError where they cannot follow the policy."""
    own: nn.Module = transformers_model(model)
    backbone = getattr(own, "base_model", None)
    layers = list(getattr(backbone, "layers", None) or [])
    if not layers or not all(hasattr(layer, "gradient_checkpointing") for layer in layers):
        raise UserError(
            f"checkpointing {policy.name}: {type(own).__name__} has no layers that can run again; "
            "leave train.checkpointing out"
        )
    if policy.needs_fused_layers:
        for index, layer in enumerate(layers):
            if not isinstance(own_forward(layer), DecoderLayerForward):
                raise UserError(
                    f"checkpointing {policy.name}: layer {index} ({type(layer).__name__}) does not "
                    "run as the engine's halves; accelerate the model (accelerate: true), or take "
                    "checkpointing layer or every_2"
                )
    return layers
