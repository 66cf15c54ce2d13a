"""Supervised fine-tuning in which records or messages weigh more or less than others."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from lora_engine.data.batch import PackedBatch
from lora_engine.data.dataset import TokenizedDataset
from lora_engine.data.render import EXAMPLE_WEIGHT, WEIGHT
from lora_engine.errors import UserError
from lora_engine.objectives.base import NATS_PER_TARGET, Loss, Objective, Reads, TargetScores


@dataclass(frozen=True)
class WeightedSFT:
    """−Σ w log p(target) / Σ w, w the weight of each target: of its record times its message.

    Targets of equal weight count as in `SFT`, whatever that weight is.
    """

    name: ClassVar[str] = "weighted sft"
    unit: ClassVar[str] = NATS_PER_TARGET
    reads: ClassVar[Reads] = Reads(each_logprob=True)

    def weighted(self) -> Objective:
        """Itself."""
        return self

    def weight(self, batch: PackedBatch) -> float:
        """The sum of its targets' weights."""
        return float(batch.columns[WEIGHT].double().sum())

    def __call__(self, scores: TargetScores, batch: PackedBatch) -> Loss:
        """In nats."""
        weights = batch.columns[WEIGHT].to(scores.logprobs.dtype)
        return Loss(-(scores.logprobs * weights).sum())


@runtime_checkable
class Weighable(Objective, Protocol):
    """An objective of which there is one whose targets weigh more or less."""

    def weighted(self) -> Objective | None:
        """That objective; None: with these settings there is none."""


def with_weights(objective: Objective, datasets: Iterable[TokenizedDataset]) -> Objective:
    """The objective that takes the weights that examples have: what is `Weighable`, weighted.

    Raises UserError for weights that the objective would not take.
    """
    if objective.reads.weights:
        return objective
    columns = (WEIGHT, EXAMPLE_WEIGHT)
    named = (data.name for data in datasets if any(map(data.has_column, columns)))
    weighted = next(named, None)
    if weighted is None:
        return objective
    taking = objective.weighted() if isinstance(objective, Weighable) else None
    if taking is not None:
        return taking
    raise UserError(
        f"{weighted}: has records or messages with a 'weight', which the objective "
        f"{objective.name} does not take; leave the weights out"
    )
