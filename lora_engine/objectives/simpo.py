"""Simple preference optimisation: mean log-probabilities, a margin, no reference."""

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from lora_engine.data.batch import PackedBatch
from lora_engine.objectives.base import Loss, Reads, TargetScores
from lora_engine.objectives.sequences import (
    Sides,
    means,
    pair_metrics,
    sides,
    weight_of,
    weighted,
)
from lora_engine.objectives.settings import check_not_negative, check_positive, check_share


@dataclass(frozen=True)
class SimPO:
    """−(1 − ε) log σ(βh − γ) − ε log σ(γ − βh) of each pair, with h the difference of the answers'
    mean log-probabilities (arXiv:2405.14734). gamma: γ, the margin aimed at."""

    beta: float = 2.0
    gamma: float = 1.0
    label_smoothing: float = 0.0
    name: ClassVar[str] = "simpo"
    unit: ClassVar[str] = "nats per pair"
    reads: ClassVar[Reads] = Reads(each_logprob=True, examples="pairs", weights=True)

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)
        check_not_negative(gamma=self.gamma)
        check_share(label_smoothing=self.label_smoothing)

    def weight(self, batch: PackedBatch) -> float:
        """Its pairs."""
        return weight_of(batch, "chosen")

    def __call__(self, scores: TargetScores, batch: PackedBatch) -> Loss:
        """Σ over pairs; rewards are β times the mean log-probabilities."""
        logps = sides(means(scores.logprobs, batch), batch)
        aimed = self.beta * (logps.chosen - logps.rejected) - self.gamma
        smooth = self.label_smoothing
        losses = -(1 - smooth) * logsigmoid(aimed) - smooth * logsigmoid(-aimed)
        rewards = Sides(self.beta * logps.chosen, self.beta * logps.rejected)
        return Loss(weighted(losses, batch, "chosen").sum(), pair_metrics(rewards, logps))
