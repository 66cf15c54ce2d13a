"""Softmax cross-entropy of rows of logits."""

import torch
from torch import Tensor

from lora_engine.reference.numeric import upcast


def cross_entropy(
    logits: Tensor,  # [U, V]
    target: Tensor,  # [U] int64
    ignore_index: int = -100,
) -> Tensor:
    """`logsumexp(logits) - logits[target]` for each row [U], float32; 0 for ignored rows."""
    logits32 = upcast(logits)
    ignored = target == ignore_index
    safe_target = target.masked_fill(ignored, 0)
    chosen = logits32.gather(-1, safe_target[:, None])[:, 0]
    loss = torch.logsumexp(logits32, dim=-1) - chosen
    return torch.where(ignored, torch.zeros_like(loss), loss)
