"""What PEFT adds to the result of a layer that has the adapter in its weight already."""

import torch
from torch import Tensor

from lora_engine.errors import UserError
from lora_engine.models.families.modules import LoraLinear
from lora_engine.models.quantized.merge_aware_linear import MergeAwareLinear


class StraightThrough:
    """What PEFT calls in the place of B A x: the adapter is in the base layer's weight already.

    Its methods are those of `peft.tuners.lora.layer.LoraVariant`.
    """

    @staticmethod
    def forward(
        module: LoraLinear, active_adapter: str, x: Tensor, result: Tensor, **kwargs: object
    ) -> Tensor:
        """`result`, with the gradients of A and B that adding s B A x would give them."""
        base = module.get_base_layer()
        assert isinstance(base, MergeAwareLinear)
        merges = base.mergeable.quantises
        if merges and not torch.is_grad_enabled():
            return result
        lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        delta: Tensor = lora_b(lora_a(x.detach() if merges else x)) * module.scaling[active_adapter]
        return result + (delta - delta.detach() if merges else delta)

    @staticmethod
    def merge_safe(module: LoraLinear, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Refused: PEFT would write a merged weight that would be merged again."""
        raise UserError(
            "a merge-aware adapter is in its layer's weight already; merge its folder with "
            "lora-engine merge"
        )

    merge_unsafe = unmerge = merge_safe
