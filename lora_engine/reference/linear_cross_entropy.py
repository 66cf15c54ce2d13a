"""Cross-entropy of a linear head's logits."""

from torch import Tensor

from lora_engine.reference.cross_entropy import cross_entropy


def linear_cross_entropy(
    hidden: Tensor,  # [U, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [U] int64
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """The loss of each row [U], and whether its target has the largest logit [U] bool.

    The logits are rounded to hidden's dtype, as a linear layer does.
    """
    logits = hidden @ weight.to(hidden.dtype).T
    safe_target = target.masked_fill(target == ignore_index, 0)
    chosen = logits.gather(-1, safe_target[:, None])[:, 0]
    correct = (chosen == logits.amax(-1)) & (target != ignore_index)
    return cross_entropy(logits, target, ignore_index), correct
