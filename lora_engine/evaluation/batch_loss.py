"""An objective's loss of one packed batch: the model runs, the objective judges its results."""

import torch
from torch import Tensor, nn

from lora_engine.data.batch import PackedBatch
from lora_engine.errors import UserError
from lora_engine.evaluation.modes import inference, without_adapters
from lora_engine.models.attach.head import output_head
from lora_engine.models.attach.packed import packed_hidden_states
from lora_engine.models.peft.routing import active_adapters, adapters_of, is_peft
from lora_engine.objectives.answers import loss_of
from lora_engine.objectives.base import Loss, Objective, TargetScores
from lora_engine.ops.context import Context


def batch_loss(model: nn.Module, batch: PackedBatch, objective: Objective) -> Loss:
    """The objective's loss; batch as for `target_scores`."""
    return loss_of(objective, target_scores(model, batch, objective), batch)


def target_scores(model: nn.Module, batch: PackedBatch, objective: Objective) -> TargetScores:
    """What the model says of the batch's U targets, as much as the objective reads.

    batch must have targets (U > 0) and be on the model's device. The head sees only the U rows
    that have a target. Where examples name adapters and several are active, each example runs
    through its own. Raises UserError for a reference of a model without adapters.
    """
    reads = objective.reads
    reference = reference_logprobs(model, batch) if reads.reference else None
    with adapters_of(model, batch):
        hidden = packed_hidden_states(model, batch, batch.target_index)
    reduction = "none" if reads.each_logprob else "sum"
    results = output_head(model).cross_entropy(
        hidden, batch.target_ids, reduction=reduction, entropy=reads.entropy
    )
    if reads.each_logprob:
        logprobs = -results.loss
        total = logprobs.sum()
    else:
        total = -results.loss
        logprobs = _Undifferentiable.apply(results.logprobs, total, objective.name)
    return TargetScores(logprobs, total, results.correct, results.entropy, reference)


def reference_logprobs(model: nn.Module, batch: PackedBatch) -> Tensor:
    """[U] float32: the targets' log-probabilities under the model without its adapters.

    In evaluation mode and without gradients. Draws no random number.
    """
    if not is_peft(model) or not active_adapters(model):
        raise UserError(
            "the objective compares the model with itself without adapters, and it has none: "
            "add an adapter with peft.get_peft_model"
        )
    with inference(model), without_adapters(model):
        hidden = packed_hidden_states(model, batch, batch.target_index)
        return output_head(model).cross_entropy(hidden, batch.target_ids, reduction="sum").logprobs


class _Undifferentiable(torch.autograd.Function):
    """Log-probabilities [U] from which no gradient goes on to the model.

    One that arrives raises UserError: it would be missing in the step. total: the sum, which makes
    autograd look here.
    """

    @staticmethod
    def forward(ctx: Context[str], logprobs: Tensor, total: Tensor, objective: str) -> Tensor:
        ctx.kept = objective
        return logprobs.clone()

    @staticmethod
    def backward(ctx: Context[str], grad: Tensor) -> tuple[Tensor | None, ...]:
        raise UserError(
            f"objective {ctx.kept}: its loss is differentiated in single log-probabilities; set "
            "reads = Reads(each_logprob=True), or use them as scores.logprobs.detach()"
        )
