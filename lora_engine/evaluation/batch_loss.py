"""An objective's loss of one packed batch: the model runs, the objective judges its results."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lora_engine.data.batch import PackedBatch, without_shared_prefixes
from lora_engine.distributed.world import ALONE, World
from lora_engine.errors import UserError
from lora_engine.evaluation.modes import as_reference, inference, with_adapter, without_adapters
from lora_engine.models.attach.head import Head, output_head
from lora_engine.models.attach.packed import can_share_prefixes, packed_hidden_states
from lora_engine.models.attach.scalar_head import scalar_head
from lora_engine.models.peft.routing import active_adapters, adapters_of, is_peft
from lora_engine.objectives.answers import loss_of
from lora_engine.objectives.base import Divergence, Loss, Objective, TargetScores, Teacher
from lora_engine.ops import linear_divergence
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
    if not reads.predicts_tokens:
        return _example_values(model, batch)
    reference = reference_logprobs(model, batch, reads.temperature) if reads.reference else None
    teacher = None if reads.divergence is None else _taught(model, batch, reads.divergence)
    with adapters_of(model, batch):
        hidden = packed_hidden_states(model, batch, batch.target_index)
    reduction = "none" if reads.each_logprob else "sum"
    head = output_head(model)
    results = head.cross_entropy(
        hidden,
        batch.target_ids,
        reduction=reduction,
        entropy=reads.entropy,
        temperature=reads.temperature,
    )
    if reads.each_logprob:
        logprobs = -results.loss
        total = logprobs.sum()
    else:
        total = -results.loss
        logprobs = _Undifferentiable.apply(results.logprobs, total, objective.name)
    scores = TargetScores(
        logprobs=logprobs,
        total=total,
        correct=results.correct,
        entropy=results.entropy,
        reference=reference,
    )
    if teacher is not None:
        divergence = _divergence(head, hidden, teacher, objective)
        scores = replace(scores, divergence=divergence)
    if reads.values_targets:
        scores = replace(scores, values=scalar_head(model)(hidden))
    return scores


def reference_logprobs(model: nn.Module, batch: PackedBatch, temperature: float = 1.0) -> Tensor:
    """[U] float32: the targets' log-probabilities under the model without its adapters, or with the
    adapter that its run began with.

    In evaluation mode and without gradients. Draws no random number.
    """
    if not is_peft(model) or not active_adapters(model):
        raise UserError(
            "the objective compares the model with itself without adapters, and it has none: "
            "add an adapter with peft.get_peft_model"
        )
    with inference(model), as_reference(model):
        hidden = packed_hidden_states(model, batch, batch.target_index)
        return (
            output_head(model)
            .cross_entropy(hidden, batch.target_ids, reduction="sum", temperature=temperature)
            .logprobs
        )


def with_statistics(
    model: nn.Module,
    batches: Iterable[PackedBatch],
    objective: Objective,
    check: Callable[[], None] = lambda: None,
    world: World = ALONE,
) -> Iterable[PackedBatch]:
    """The batches of a step, or of an evaluation, with what the objective measures over all, those
    of the other processes of `world` included.

    "kl", if it reads mismatched examples: the mean over them of log p(answer) less that of the
    reference, in evaluation mode, or 0 where that is less; without gradients.
    check: called before each batch is run, where no other process waits.
    """
    if not objective.reads.mismatched:
        return batches
    batches, moved, count = list(batches), torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        if batch.mismatched is None:
            raise UserError(
                f"objective {objective.name} compares answers with answers to other prompts, and "
                "the batch has none; give it records of 'prompt', 'completion' and 'label'"
            )
        if world.size == 1:
            check()
        other = batch.mismatched.to(next(model.parameters()).device)
        reference = reference_logprobs(model, other)
        with inference(model), adapters_of(model, other):
            hidden = packed_hidden_states(model, other, other.target_index)
            own = output_head(model).cross_entropy(hidden, other.target_ids, reduction="sum")
        moved = moved.to(reference.device) + (own.logprobs.double() - reference.double()).sum()
        count += other.num_examples
    if world.size > 1:
        parts = cast(list[tuple[float, int]], world.gather((moved.item(), count)))
        moved = torch.tensor(math.fsum(part[0] for part in parts), dtype=torch.float64)
        count = sum(part[1] for part in parts)
    kl = (moved / max(count, 1)).clamp(min=0)
    return [replace(batch, statistics={"kl": kl}) for batch in batches]


def _example_values(model: nn.Module, batch: PackedBatch) -> TargetScores:
    """The scalar head's value of each example, at its last token."""
    with adapters_of(model, batch):
        hidden = packed_hidden_states(model, batch, batch.last_index)
    values = scalar_head(model)(hidden)
    none = values.new_zeros(0)
    return TargetScores(none, none.sum(), none.bool(), values=values)


class _Taught(NamedTuple):
    """The teacher's head, and its hidden states [U, H] at the targets."""

    head: Head
    hidden: Tensor


def _taught(model: nn.Module, batch: PackedBatch, divergence: Divergence) -> _Taught:
    """What the teacher makes of the batch, in evaluation mode and without gradients."""
    teacher = divergence.teacher
    if isinstance(teacher, Teacher):
        other = teacher.model
        with inference(other):
            whole = batch if can_share_prefixes(other) else without_shared_prefixes(batch)
            hidden = packed_hidden_states(other, whole, whole.target_index)
            return _Taught(output_head(other), hidden)
    if not is_peft(model) or not active_adapters(model):
        raise UserError(
            "the objective's teacher is an adapter of the model or the model without adapters, and "
            "it has none: add an adapter with peft.get_peft_model, or give a teacher"
        )
    if teacher and teacher not in model.peft_config:
        raise UserError(
            f"the objective's teacher {teacher!r} is no adapter of the model, which has "
            f"{', '.join(model.peft_config)}"
        )
    mode = with_adapter(model, teacher) if teacher else without_adapters(model)
    with inference(model), mode:
        hidden = packed_hidden_states(model, batch, batch.target_index)
        return _Taught(output_head(model), hidden)


def _divergence(head: Head, hidden: Tensor, teacher: _Taught, objective: Objective) -> Tensor:
    """Scalar: the sum over targets of the divergence from the teacher's distributions."""
    wanted = objective.reads.divergence
    assert wanted is not None
    if len(head.weight) != len(teacher.head.weight):
        raise UserError(
            f"objective {objective.name}: the teacher has {len(teacher.head.weight):,} tokens and "
            f"the model {len(head.weight):,}; give a teacher of the same vocabulary"
        )
    student, taught = head.put_to(hidden), teacher.head.put_to(teacher.hidden)
    return linear_divergence(
        student, taught, beta=wanted.beta, temperature=wanted.temperature
    ).total


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
