"""Cross-entropy of a linear head's logits."""

import torch.nn.functional as F
from torch import Tensor

from lora_engine.reference.cross_entropy import TokenLosses, token_losses
from lora_engine.reference.lora_linear import lora_linear


def linear_cross_entropy(
    hidden: Tensor,  # [U, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [U] int64
    ignore_index: int = -100,
    *,
    bias: Tensor | None = None,  # [V]
    lora: tuple[Tensor, Tensor, float] | None = None,  # lora_a [r, H], lora_b [V, r], scaling
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> TokenLosses:
    """`token_losses` of `hidden @ weightᵀ + bias`, with a LoRA adapter on the head where given.

    The logits are rounded to hidden's dtype, as a linear layer does.
    """
    weight = weight.to(hidden.dtype)
    bias = None if bias is None else bias.to(hidden.dtype)
    if lora is None:
        logits = F.linear(hidden, weight, bias)
    else:
        logits = lora_linear(hidden, weight, *lora, bias)
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    return token_losses(logits, target, ignore_index, softcap=softcap, **options)
