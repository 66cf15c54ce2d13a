"""Functions of transformers that are found by a model's file, or by a name in a register."""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType

from torch import Tensor, nn

from lora_engine.models.families.modules import Attention

# (q, k, cos, sin) -> q and k rotated, all [B, heads, L, D] but the tables
Rotation = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# (module, query, key, value, mask, **options) -> attention's result and its weights
AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


def rotation_of(module: nn.Module) -> Rotation:
    """How the file of an attention layer's class rotates queries and keys."""
    found = (getattr(file, "apply_rotary_pos_emb", None) for file in _files_of(module))
    rotation: Rotation = next(filter(None, found))
    return rotation


def eager_attention_of(module: nn.Module) -> AttentionFunction:
    """The attention that returns its weights, as the file of an attention layer's class has it."""
    found = (getattr(file, "eager_attention_forward", None) for file in _files_of(module))
    eager: AttentionFunction = next(filter(None, found))
    return eager


def _files_of(module: nn.Module) -> Iterator[ModuleType]:
    """The file of the module's class, then those of the classes that it is derived from."""
    return (sys.modules[kind.__module__] for kind in type(module).__mro__)


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
