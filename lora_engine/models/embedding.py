"""Embeddings with LoRA."""

from typing import Any

from torch import Tensor, nn

from lora_engine import ops
from lora_engine.models.lora_state import UNROUTED
from lora_engine.models.router import AdapterRouter


class EmbeddingForward:
    """The forward of PEFT's LoRA layer around an embedding."""

    def __init__(self, module: Any, router: AdapterRouter) -> None:
        self.module, self.router, self.original = module, router, module.forward

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        module = self.module
        if args or kwargs or why_not(module) is not None:
            result: Tensor = self.original(x, *args, **kwargs)
            return result
        names = self.router.names
        adapters = [
            ops.LoraFactors(
                module.lora_embedding_A[name],
                module.lora_embedding_B[name],
                module.scaling[name],
                None,
                names.index(name) if name in names else UNROUTED,
            )
            for name in module.active_adapters
            if name in module.lora_embedding_A and not module.disable_adapters
        ]
        routes = self.router.routes(x.shape, x.device)
        return ops.lora_embedding(x, module.get_base_layer().weight, adapters, routes=routes)


def is_lora_embedding(module: nn.Module) -> bool:
    """Whether `module` is PEFT's LoRA layer around an embedding."""
    import peft

    return isinstance(module, peft.tuners.lora.layer.Embedding)


def why_not(module: Any) -> str | None:
    """Why the embedding runs as PEFT's own; None if it does not."""
    base = module.get_base_layer()
    if type(base) is not nn.Embedding or base.max_norm is not None or base.scale_grad_by_freq:
        return f"the base layer is {type(base).__name__}, not a plain nn.Embedding"
    if base.weight.requires_grad:
        return "the base weight is trained"
    if module.merged:
        return "the adapter is merged"
    if any(name in module.lora_variant for name in module.active_adapters):
        return "a variant of LoRA on an embedding"
    return None
