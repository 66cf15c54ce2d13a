"""What `accelerate` has done to a model, kept on the model itself.

A copy of the model (`copy.deepcopy`) carries its own, and can be restored by itself.
"""

from dataclasses import dataclass, field

from torch import nn

from lora_engine.models.attach.patches import Patches
from lora_engine.models.peft.router import AdapterRouter

_ATTRIBUTE = "_lora_engine"


@dataclass
class Attachment:
    """What `accelerate` has done to a transformers model, and the router of its adapters.

    own_attention: the attention implementation that lora_engine's replaces; None if it does not.
    """

    router: AdapterRouter
    own_attention: str | None = None
    patches: Patches = field(default_factory=Patches)


def attachment(model: nn.Module) -> Attachment | None:
    """The attachment of an accelerated transformers model; None for other models."""
    attached: Attachment | None = vars(model).get(_ATTRIBUTE)
    return attached


def attach(model: nn.Module) -> Attachment:
    """A new attachment, with nothing done yet."""
    made = Attachment(AdapterRouter())
    object.__setattr__(model, _ATTRIBUTE, made)
    return made


def detach(model: nn.Module) -> None:
    """Takes back all that was done to the model, if anything was."""
    attached = attachment(model)
    if attached is not None:
        object.__delattr__(model, _ATTRIBUTE)
        attached.patches.undo()
