"""What an objective answers, checked: a slip in one is a line that names it, not a wrong number."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from numbers import Real

import torch
from torch import Tensor

from lora_engine.data.batch import PackedBatch
from lora_engine.errors import UserError
from lora_engine.objectives.base import Loss, Mean, Objective, Reads, TargetScores


def check_objective(objective: object, where: str) -> None:
    """Raises UserError for what is no objective. where: who was given it."""
    if not is_dataclass(objective) or isinstance(objective, type):
        kind = getattr(objective, "__name__", type(objective).__name__)
        raise UserError(
            f"{where}: objective is {kind}, expected an instance of a dataclass such as "
            "lora_engine.objectives.sft.SFT()"
        )
    fits = {
        "name": isinstance(getattr(objective, "name", None), str),
        "unit": isinstance(getattr(objective, "unit", None), str),
        "reads": isinstance(getattr(objective, "reads", None), Reads),
        "weight": callable(getattr(objective, "weight", None)),
        "__call__": callable(objective),
    }
    wrong = [name for name, does in fits.items() if not does]
    if wrong:
        raise UserError(
            f"{where}: objective {type(objective).__name__} lacks {', '.join(wrong)}; "
            "lora_engine.objectives.base.Objective says what each is"
        )


# The name of the one term of a loss that does not name its terms.
WHOLE = ""


def weight_of(objective: Objective, batch: PackedBatch) -> dict[str, float]:
    """What the batch, which is on the CPU, contributes to the divisor of each term of the loss.

    Raises UserError for what is no finite number of 0 or more.
    """
    answer: object = objective.weight(batch)
    by_term = answer if isinstance(answer, Mapping) else {WHOLE: answer}
    weights = {}
    for term, value in by_term.items():
        single = isinstance(value, Tensor) and value.numel() == 1
        weight = float(value) if isinstance(value, Real) or single else math.nan  # type: ignore[arg-type]
        if not 0 <= weight < math.inf:
            raise UserError(
                f"objective {objective.name}: its weight of a batch is {answer!r}; give a finite "
                "number of 0 or more"
            )
        weights[term] = weight
    return weights


def has_weight(objective: Objective, batch: PackedBatch) -> bool:
    """Whether the batch, which is on the CPU, has anything that the objective learns from."""
    return is_seen(objective, batch, weight_of(objective, batch))


def is_seen(objective: Objective, batch: PackedBatch, weights: Mapping[str, float]) -> bool:
    """Whether the model sees a batch of these weights.

    One without targets has nothing to see, but counts where examples are counted, as it would
    beside others.
    """
    read = batch.num_targets > 0 or not objective.reads.predicts_tokens
    return read and any(weights.values())


def added(weights: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The weights of several batches, by term."""
    total: dict[str, float] = {}
    for of_batch in weights:
        for term, weight in of_batch.items():
            total[term] = total.get(term, 0.0) + weight
    return total


def terms_of(loss: Loss) -> dict[str, Tensor]:
    """The terms of a loss by their names."""
    return dict(loss.total) if isinstance(loss.total, Mapping) else {WHOLE: loss.total}


def mean_of(objective: Objective, loss: Loss, weights: Mapping[str, float]) -> Tensor:
    """The sum of the loss's terms, each over its weight in all batches of a step.

    Raises UserError for terms that are not those of the weights.
    """
    terms = terms_of(loss)
    if terms.keys() != weights.keys():
        raise UserError(
            f"objective {objective.name}: its loss has the terms {list(terms)}, its weight of a "
            f"batch {list(weights)}; give both the same names"
        )
    parts = [total / weights[term] for term, total in terms.items() if weights[term]]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def loss_of(objective: Objective, scores: TargetScores, batch: PackedBatch) -> Loss:
    """What the objective makes of the scores.

    Raises UserError for what is no Loss of scalars.
    """
    answer: object = objective(scores, batch)
    if not isinstance(answer, Loss):
        raise UserError(
            f"objective {objective.name}: returns {_kind(answer)}, expected an "
            "objectives.base.Loss(total, metrics)"
        )
    for total in terms_of(answer).values():
        if not _is_scalar(total) or not total.is_floating_point():
            raise UserError(
                f"objective {objective.name}: its loss is {_kind(total)}; sum it over the batch "
                "to a tensor of one floating-point number without dimensions"
            )
    metrics: object = answer.metrics
    if not isinstance(metrics, Mapping):
        raise UserError(
            f"objective {objective.name}: its metrics are {_kind(metrics)}, expected a dict of "
            "objectives.base.Mean by name"
        )
    for name, mean in metrics.items():
        if not (
            isinstance(name, str)
            and isinstance(mean, Mean)
            and _is_scalar(mean.total)
            and isinstance(mean.count, Real)
            and 0 <= mean.count < math.inf
        ):
            parts = (mean.total, mean.count) if isinstance(mean, Mean) else (mean,)
            raise UserError(
                f"objective {objective.name}: its metric {name!r} is made of "
                f"{' and '.join(map(_kind, parts))}; give an objectives.base.Mean of a tensor "
                "without dimensions and a number of 0 or more"
            )
    return answer


def _is_scalar(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return f"{value!r}" if isinstance(value, Real) else type(value).__name__
