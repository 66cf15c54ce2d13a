"""An objective with a term against forgetting: the KL divergence from the untrained model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from lora_engine.data.batch import PackedBatch
from lora_engine.errors import UserError
from lora_engine.objectives.base import Divergence, Loss, Mean, Objective, Reads, TargetScores
from lora_engine.objectives.online import OnlineObjective

TERM = "kl_to_base"


@dataclass(frozen=True)
class CloseToBase:
    """The objective's loss plus coefficient times the mean over targets of KL(q, p).

    p is the model's distribution over the vocabulary, q that of the model without its adapters, a
    constant: where q is sure the model stays so, too (learning without forgetting,
    arXiv:1606.09282). Distributions are made a chunk of rows at a time.
    """

    objective: Objective
    coefficient: float

    def __post_init__(self) -> None:
        own = self.objective
        problem = None
        if isinstance(own, OnlineObjective):
            problem = "has such a term of its own, objective.kl_weight"
        elif own.reads.divergence is not None:
            problem = "is drawn to a teacher already"
        elif own.reads.values == "examples":
            problem = "predicts no tokens"
        if problem is not None:
            raise UserError(f"train.kl_to_base: objective {own.name} {problem}; leave it out")

    @property
    def name(self) -> str:
        return self.objective.name

    @property
    def unit(self) -> str:
        return self.objective.unit

    @property
    def reads(self) -> Reads:
        return replace(self.objective.reads, divergence=Divergence())

    def weight(self, batch: PackedBatch) -> Mapping[str, float]:
        """The objective's own, and of the term the number of targets."""
        own = self.objective.weight(batch)
        named = own if isinstance(own, Mapping) else {"": own}
        return {**named, TERM: batch.num_targets}

    def __call__(self, scores: TargetScores, batch: PackedBatch) -> Loss:
        """With the metric `kl_to_base`, the mean divergence before the coefficient."""
        assert scores.divergence is not None, "it reads the divergence"
        own = self.objective(scores, batch)
        named = own.total if isinstance(own.total, Mapping) else {"": own.total}
        terms: dict[str, Tensor] = {**named, TERM: self.coefficient * scores.divergence}
        metric = Mean(scores.divergence.detach(), batch.num_targets)
        return Loss(terms, {**own.metrics, TERM: metric})
