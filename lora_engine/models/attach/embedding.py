"""Embeddings with LoRA."""

from collections.abc import Callable
from typing import TypeGuard

from torch import Tensor, nn

from lora_engine import ops
from lora_engine.models.attach.forwards import ReplacedForward, uncompiled
from lora_engine.models.attach.linear_group import are_altered
from lora_engine.models.families.modules import LoraEmbedding
from lora_engine.models.peft.lora_state import UNROUTED, hooks_everywhere
from lora_engine.models.peft.router import AdapterRouter


class EmbeddingForward(ReplacedForward):
    """The forward of PEFT's LoRA layer around an embedding."""

    def __init__(self, module: LoraEmbedding, router: AdapterRouter) -> None:
        self.module, self.router = module, router
        self.original: Callable[..., Tensor] = module.forward

    @uncompiled
    def __call__(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        module = self.module
        if args or kwargs or why_not(module) is not None:
            return self.original(x, *args, **kwargs)
        names = self.router.names
        adapters = [
            ops.LoraFactors(
                lora_a=module.lora_embedding_A[name],
                lora_b=module.lora_embedding_B[name],
                scaling=module.scaling[name],
                magnitude=None,
                adapter=names.index(name) if name in names else UNROUTED,
            )
            for name in module.active_adapters
            if name in module.lora_embedding_A and not module.disable_adapters
        ]
        routes = self.router.routes(x.shape, x.device)
        base = module.get_base_layer()
        return ops.lora_embedding(
            x, base.weight, adapters, routes=routes, padding_idx=base.padding_idx
        )


def is_lora_embedding(module: nn.Module) -> TypeGuard[LoraEmbedding]:
    """Whether `module` is PEFT's LoRA layer around an embedding."""
    import peft

    return isinstance(module, peft.tuners.lora.layer.Embedding)


def why_not(module: LoraEmbedding) -> str | None:
    """Why the embedding runs as PEFT's own; None if it does not."""
    base = module.get_base_layer()
    if type(base) is not nn.Embedding or base.max_norm or base.scale_grad_by_freq or base.sparse:
        return f"the base layer is {type(base).__name__}, not a plain nn.Embedding"
    if base.weight.requires_grad:
        return "the base weight is trained"
    if module.merged:
        return "the adapter is merged"
    inner = (part for part in module.modules() if part is not module)
    if hooks_everywhere() or are_altered(inner):
        return "a part of it has hooks or was given another forward"
    if any(name in module.lora_variant for name in module.active_adapters):
        return "a variant of LoRA on an embedding"
    return None
