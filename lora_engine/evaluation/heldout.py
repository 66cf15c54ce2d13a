"""Loss and token accuracy on held-out data."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from lora_engine.data.batch import PackedBatch
from lora_engine.errors import UserError
from lora_engine.evaluation.batch_loss import target_scores, with_statistics
from lora_engine.evaluation.modes import inference
from lora_engine.evaluation.nonfinite import NonFiniteError, first_nonfinite_layer
from lora_engine.objectives.answers import added, loss_of, terms_of, weight_of
from lora_engine.objectives.base import Objective


@dataclass(frozen=True)
class HeldoutResult:
    """loss: the objective's, over its weight; of SFT the mean over targets of −log p, in nats.
    accuracy: share of targets that are the most likely token; None where what is measured are texts
    that the model writes. tokens: real tokens read. targets: supervised tokens among them.
    metrics: the objective's own."""

    loss: float
    accuracy: float | None
    tokens: int
    targets: int
    metrics: Mapping[str, float] = field(default_factory=dict)


def evaluate(
    model: nn.Module,
    batches: Iterable[PackedBatch],
    objective: Objective,
    *,
    step: int | None = None,
) -> HeldoutResult:
    """The objective's loss, and token accuracy, over `batches`, without dropout.

    The result of SFT does not depend on how the examples are packed, beyond rounding. `step` is
    named in the NonFiniteError raised if a batch's loss or a metric is not finite. UserError if
    `batches` have nothing that the objective measures.
    """
    device = next(model.parameters()).device
    totals: dict[str, float] = {}
    correct = torch.zeros((), dtype=torch.int64, device=device)
    sums: dict[str, tuple[float, float]] = {}
    tokens = targets = 0
    weights: list[Mapping[str, float]] = []
    with inference(model):
        for batch in with_statistics(model, batches, objective):
            tokens += batch.num_tokens
            of_batch = weight_of(objective, batch)
            if not any(of_batch.values()):
                continue
            weights.append(of_batch)
            on_device = batch.to(device)
            scores = target_scores(model, on_device, objective)
            judged = loss_of(objective, scores.double(), on_device)
            terms = {term: total.item() for term, total in terms_of(judged).items()}
            values = {name: mean.total.item() for name, mean in judged.metrics.items()}
            for name, value in [*(("loss", value) for value in terms.values()), *values.items()]:
                if not math.isfinite(value):
                    raise NonFiniteError(
                        f"the held-out {name} is {value}",
                        step,
                        batch.origins,
                        first_nonfinite_layer(model, on_device, objective),
                    )
            totals = {term: totals.get(term, 0.0) + value for term, value in terms.items()}
            correct += scores.correct.sum()
            targets += scores.correct.numel()
            for name, mean in judged.metrics.items():
                total, count = sums.get(name, (0.0, 0.0))
                sums[name] = total + values[name], count + mean.count
    weight = added(weights)
    if not any(weight.values()) or not (targets or objective.reads.values):
        raise UserError(
            f"the held-out data have no supervised tokens to measure a loss on ({objective.name})"
        )
    metrics = {name: total / count for name, (total, count) in sums.items() if count}
    loss = sum(total / weight[term] for term, total in totals.items() if weight[term])
    # A scalar head predicts no token: what is right is the order of its values.
    accuracy = correct.item() / targets if targets else metrics.get("rewards/accuracies", 0.0)
    return HeldoutResult(loss, accuracy, tokens, targets, metrics)
