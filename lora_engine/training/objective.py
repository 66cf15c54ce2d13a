"""The objective: the next token's cross-entropy at the supervised positions."""

from typing import TYPE_CHECKING

from torch import nn

from lora_engine.data.batch import PackedBatch
from lora_engine.models.head import output_head
from lora_engine.models.packed import packed_hidden_states

if TYPE_CHECKING:
    from lora_engine.ops.linear_cross_entropy import LinearCrossEntropy


def supervised_loss(model: nn.Module, batch: PackedBatch) -> "LinearCrossEntropy":
    """Sum over the batch's U targets of −log p(target), with per-token results.

    batch must have targets (U > 0) and be on the model's device. The head sees only the U rows
    that have a target.
    """
    supervised = packed_hidden_states(model, batch, batch.target_index)
    return output_head(model).cross_entropy(supervised, batch.target_ids, reduction="sum")
