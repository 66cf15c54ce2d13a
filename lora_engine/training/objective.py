"""The objective: the next token's cross-entropy at the supervised positions."""

from typing import TYPE_CHECKING

from torch import nn

from lora_engine import ops
from lora_engine.data.batch import PackedBatch
from lora_engine.models.causal_lm import head_weight, packed_hidden_states

if TYPE_CHECKING:
    from lora_engine.ops.linear_cross_entropy import LinearCrossEntropy


def supervised_loss(model: nn.Module, batch: PackedBatch) -> "LinearCrossEntropy":
    """Sum over the batch's U targets of −log p(target), with per-token results.

    batch must have targets (U > 0) and be on the model's device. The head sees only the U rows
    that have a target.
    """
    hidden = packed_hidden_states(model, batch)
    supervised = hidden.index_select(0, batch.target_index)
    return ops.linear_cross_entropy(
        supervised, head_weight(model), batch.target_ids, reduction="sum"
    )
