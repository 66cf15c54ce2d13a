"""Continued pre-training on a domain's texts: every token counts."""

from dataclasses import dataclass
from typing import ClassVar

from lora_engine.data.batch import PackedBatch
from lora_engine.objectives.base import NATS_PER_TARGET, Loss, Mean, Reads, TargetScores
from lora_engine.objectives.weighted import WeightedSFT


@dataclass(frozen=True)
class Domain:
    """−Σ log p(target), over the number of targets, and optionally less β times the entropy.

    entropy_bonus: how much a nat of the mean entropy counts; more than 0 keeps a model that sees
        the same texts again from becoming sure of them (arXiv:1701.06548).

    With `data.loss_on: all` each token of a record is a target, its prompt too.
    """

    entropy_bonus: float = 0.0
    name: ClassVar[str] = "domain"
    unit: ClassVar[str] = NATS_PER_TARGET

    @property
    def reads(self) -> Reads:
        return Reads(entropy=self.entropy_bonus != 0)

    def weighted(self) -> WeightedSFT | None:
        """With a weight for each target; there is none with a bonus."""
        return None if self.entropy_bonus else WeightedSFT()

    def weight(self, batch: PackedBatch) -> int:
        """Its targets."""
        return batch.num_targets

    def __call__(self, scores: TargetScores, batch: PackedBatch) -> Loss:
        """In nats."""
        if scores.entropy is None:
            return Loss(-scores.total)
        entropy = scores.entropy.sum()
        metrics = {"entropy": Mean(entropy.detach(), batch.num_targets)}
        return Loss(-scores.total - self.entropy_bonus * entropy, metrics)
