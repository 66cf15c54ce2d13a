"""The objective: the next token's cross-entropy at the supervised positions."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from lora_engine.data.batch import PackedBatch
from lora_engine.models.attach.head import output_head
from lora_engine.models.attach.packed import packed_hidden_states
from lora_engine.models.peft.routing import active_adapters, route_adapters

if TYPE_CHECKING:
    from lora_engine.ops.head.linear_cross_entropy import LinearCrossEntropy


def supervised_loss(model: nn.Module, batch: PackedBatch) -> "LinearCrossEntropy":
    """Sum over the batch's U targets of −log p(target), with per-token results.

    batch must have targets (U > 0) and be on the model's device. The head sees only the U rows
    that have a target. Where examples name adapters and several are active, each example runs
    through its own.
    """
    with adapters_of(model, batch):
        supervised = packed_hidden_states(model, batch, batch.target_index)
    return output_head(model).cross_entropy(supervised, batch.target_ids, reduction="sum")


def is_routed(model: nn.Module, batch: PackedBatch) -> bool:
    """Whether the batch's rows run through different adapters."""
    return bool(batch.adapters) and len(active_adapters(model)) > 1


def adapters_of(model: nn.Module, batch: PackedBatch) -> AbstractContextManager[None]:
    """Within this context the model runs each of the batch's rows through its adapter."""
    if not is_routed(model, batch):
        return nullcontext()
    names = active_adapters(model)
    numbers = torch.tensor([names.index(adapter) for adapter in batch.adapters])
    lengths = batch.cu_seqlens.diff()
    rows = torch.repeat_interleave(numbers.to(lengths.device), lengths, output_size=batch.num_rows)
    return route_adapters(model, names, rows)
