"""Loss and token accuracy on held-out data."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import torch
from torch import nn

from lora_engine.data.batch import PackedBatch
from lora_engine.distributed.world import ALONE, World
from lora_engine.errors import UserError, nearest
from lora_engine.evaluation.batch_loss import target_scores, with_statistics
from lora_engine.evaluation.modes import inference
from lora_engine.evaluation.nonfinite import NonFiniteError, first_nonfinite_layer
from lora_engine.objectives.answers import added, is_seen, loss_of, terms_of, weight_of
from lora_engine.objectives.base import Objective

# What a result is ranked by, and its objective's metrics, that are better low; others high.
LOWER_IS_BETTER = frozenset({"loss", "divergence", "cross_entropy", "kl", "nll_loss"})


@dataclass(frozen=True)
class ProbeResult:
    """How a model does on texts that it is not trained on. loss: the mean over targets of −log p,
    in nats. accuracy: share of targets that are the most likely token. targets: how many."""

    loss: float
    accuracy: float
    targets: int

    def rise_over(self, before: "ProbeResult") -> float:
        """The loss's relative rise: 0.1 for 10 % more than before."""
        return (self.loss - before.loss) / max(before.loss, sys.float_info.min)


@dataclass(frozen=True)
class HeldoutResult:
    """loss: the objective's, over its weight; of SFT the mean over targets of −log p, in nats.
    accuracy: share of targets that are the most likely token; None where what is measured are texts
    that the model writes. tokens: real tokens read. targets: supervised tokens among them.
    metrics: the objective's own. probe: measured beside them; None: the run has none."""

    loss: float
    accuracy: float | None
    tokens: int
    targets: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    probe: ProbeResult | None = None

    def badness(self, by: str) -> float:
        """What is lowest for the best weights: "loss", or "accuracy" or a metric, which are turned
        round where more is better. Raises UserError for what was not measured."""
        values = {"loss": self.loss, **self.metrics}
        if self.accuracy is not None:
            values["accuracy"] = self.accuracy
        if by not in values:
            close = nearest(by, values)
            hint = f"did you mean {close}?" if close else f"there is {', '.join(values)}"
            raise UserError(f"train.best_by: {by} is not measured on the held-out data; {hint}")
        return values[by] if by in LOWER_IS_BETTER else -values[by]


class Sums(TypedDict):
    """What held-out batches came to, JSON; those of several processes add up.

    weights, totals: of the loss, by term. metrics: total and count by name. failure: what was not
    finite, of which examples, and where; the rest is of no use then.
    """

    weights: dict[str, float]
    totals: dict[str, float]
    metrics: dict[str, tuple[float, float]]
    correct: int
    tokens: int
    targets: int
    failure: tuple[str, Sequence[str], str | None] | None


def evaluate(
    model: nn.Module,
    batches: Iterable[PackedBatch],
    objective: Objective,
) -> HeldoutResult:
    """The objective's loss, and token accuracy, over `batches`, without dropout.

    The result of SFT does not depend on how the examples are packed, beyond rounding. Raises
    NonFiniteError if a batch's loss or a metric is not finite, UserError if `batches` have nothing
    that the objective measures.
    """
    return result_of([measure(model, batches, objective)], objective)


def measure(
    model: nn.Module,
    batches: Iterable[PackedBatch],
    objective: Objective,
    *,
    world: World = ALONE,
) -> Sums:
    """What `evaluate` measures, of this process's share of the batches of `world`."""
    device = next(model.parameters()).device
    correct = torch.zeros((), dtype=torch.int64, device=device)
    sums: Sums = {
        "weights": {},
        "totals": {},
        "metrics": {},
        "correct": 0,
        "tokens": 0,
        "targets": 0,
        "failure": None,
    }
    weights: list[Mapping[str, float]] = []
    with inference(model):
        for batch in with_statistics(model, batches, objective, world=world):
            sums["tokens"] += batch.num_tokens
            of_batch = weight_of(objective, batch)
            weights.append(of_batch)
            if not is_seen(objective, batch, of_batch):
                continue
            on_device = batch.to(device)
            scores = target_scores(model, on_device, objective)
            judged = loss_of(objective, scores.double(), on_device)
            terms = {term: total.item() for term, total in terms_of(judged).items()}
            values = {name: mean.total.item() for name, mean in judged.metrics.items()}
            for name, value in [*(("loss", value) for value in terms.values()), *values.items()]:
                if not math.isfinite(value) and sums["failure"] is None:
                    what, layer = f"the held-out {name} is {value}", None
                    if not world.in_step:
                        layer = first_nonfinite_layer(model, on_device, objective)
                    sums["failure"] = (what, batch.origins, layer)
            if sums["failure"] is not None and not world.in_step:
                return sums
            sums["totals"] = added([sums["totals"], terms])
            correct += scores.correct.sum()
            sums["targets"] += scores.correct.numel()
            for name, mean in judged.metrics.items():
                total, count = sums["metrics"].get(name, (0.0, 0.0))
                sums["metrics"][name] = total + values[name], count + mean.count
    sums["weights"], sums["correct"] = added(weights), int(correct.item())
    return sums


def result_of(
    parts: Sequence[Sums], objective: Objective, *, step: int | None = None
) -> HeldoutResult:
    """The result of what several processes measured; raises as `evaluate`, naming `step`."""
    for part in parts:
        if part["failure"] is not None:
            what, origins, layer = part["failure"]
            raise NonFiniteError(what, step, origins, layer)
    weight = added(part["weights"] for part in parts)
    targets = sum(part["targets"] for part in parts)
    if not any(weight.values()) or not (targets or objective.reads.values):
        raise UserError(
            f"the held-out data have no supervised tokens to measure a loss on ({objective.name})"
        )
    sums: dict[str, tuple[float, float]] = {}
    for part in parts:
        for name, (of_part, its_count) in part["metrics"].items():
            total, count = sums.get(name, (0.0, 0.0))
            sums[name] = total + of_part, count + its_count
    metrics = {name: total / count for name, (total, count) in sums.items() if count}
    totals = added(part["totals"] for part in parts)
    loss = sum(total / weight[term] for term, total in totals.items() if weight[term])
    # A scalar head predicts no token: what is right is the order of its values.
    correct = sum(part["correct"] for part in parts)
    accuracy = correct / targets if targets else metrics.get("rewards/accuracies", 0.0)
    return HeldoutResult(
        loss=loss,
        accuracy=accuracy,
        tokens=sum(part["tokens"] for part in parts),
        targets=targets,
        metrics=metrics,
    )
