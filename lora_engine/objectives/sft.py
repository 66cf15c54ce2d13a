"""Supervised fine-tuning: the cross-entropy of the next token at the supervised positions."""

from dataclasses import dataclass
from typing import ClassVar

from lora_engine.data.batch import PackedBatch
from lora_engine.objectives.base import NATS_PER_TARGET, Loss, Reads, TargetScores
from lora_engine.objectives.weighted import WeightedSFT


@dataclass(frozen=True)
class SFT:
    """−Σ log p(target), over the number of targets: each supervised token counts alike."""

    name: ClassVar[str] = "sft"
    unit: ClassVar[str] = NATS_PER_TARGET
    reads: ClassVar[Reads] = Reads()

    def weighted(self) -> WeightedSFT:
        """With a weight for each target."""
        return WeightedSFT()

    def weight(self, batch: PackedBatch) -> int:
        """Its targets."""
        return batch.num_targets

    def __call__(self, scores: TargetScores, batch: PackedBatch) -> Loss:
        """In nats."""
        return Loss(-scores.total)
