"""Functions of transformers that are found by a model's file, or by a name in a register."""

import sys
from collections.abc import Callable

from torch import Tensor, nn

from lora_engine.models.families.modules import Attention

# (q, k, cos, sin) -> q and k rotated, all [B, heads, L, D] but the tables
Rotation = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# (module, query, key, value, mask, **options) -> attention's result and its weights
AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


def rotation_of(module: nn.Module) -> Rotation:
    """How the file of an attention layer's class rotates queries and keys.

    Of a class that is derived from one of transformers elsewhere: the file of that.
    """
    for kind in type(module).__mro__:
        found: Rotation | None = getattr(sys.modules[kind.__module__], "apply_rotary_pos_emb", None)
        if found is not None:
            return found
    raise LookupError(f"no file of {type(module).__name__}'s classes rotates queries and keys")


def eager_attention_of(module: nn.Module) -> AttentionFunction:
    """The attention that returns its weights, as the file of an attention layer's class has it."""
    for kind in type(module).__mro__:
        found: AttentionFunction | None
        found = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if found is not None:
            return found
    raise LookupError(f"no file of {type(module).__name__}'s classes has such an attention")


def attention_function_of(module: Attention) -> AttentionFunction:
    """The attention that an attention layer's configuration names."""
    from transformers import AttentionInterface

    name = module.config._attn_implementation
    if name == "eager":
        return eager_attention_of(module)
    registered: AttentionFunction = AttentionInterface()[name]
    return registered


def mask_maker_of(implementation: str) -> Callable[..., Tensor | None]:
    """What makes the masks of one of transformers' implementations of attention."""
    from transformers import AttentionMaskInterface

    maker: Callable[..., Tensor | None] = AttentionMaskInterface()[implementation]
    return maker
