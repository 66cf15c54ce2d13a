"""Odds-ratio preference optimisation: learning the chosen answer and the preference at once."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lora_engine.data.batch import PackedBatch
from lora_engine.objectives.base import Loss, Mean, Reads, TargetScores
from lora_engine.objectives.sequences import (
    Sides,
    chosen_targets,
    chosen_targets_weight,
    means,
    of_role,
    pair_metrics,
    sides,
    sums,
    weight_of,
    weighted,
)
from lora_engine.objectives.settings import check_not_negative


@dataclass(frozen=True)
class ORPO:
    """−Σ log p over the chosen answers' tokens, plus −β log σ(odds(chosen) − odds(rejected)) of
    each pair, with the log-odds log p̄/(1 − p̄) of p̄ = exp(mean log p) (arXiv:2403.07691).

    Needs no reference.
    """

    beta: float = 0.1
    name: ClassVar[str] = "orpo"
    unit: ClassVar[str] = "nats per chosen token and pair"
    reads: ClassVar[Reads] = Reads(each_logprob=True, examples="pairs", weights=True)

    def __post_init__(self) -> None:
        check_not_negative(beta=self.beta)

    def weight(self, batch: PackedBatch) -> dict[str, float]:
        """Tokens of the chosen answers, and pairs."""
        return {"nll": chosen_targets_weight(batch), "odds": weight_of(batch, "chosen")}

    def __call__(self, scores: TargetScores, batch: PackedBatch) -> Loss:
        """Rewards are β times the mean log-probabilities."""
        logps = sides(means(scores.logprobs, batch), batch)
        log_odds = (logps.chosen - logps.rejected) - (
            log1mexp(logps.chosen) - log1mexp(logps.rejected)
        )
        ratio = logsigmoid(log_odds)
        nll = -of_role(sums(scores.logprobs, batch), batch, "chosen")
        rewards = Sides(self.beta * logps.chosen, self.beta * logps.rejected)
        metrics = {
            **pair_metrics(rewards, logps),
            "nll_loss": Mean(nll.detach().sum(), chosen_targets(batch)),
            "log_odds_ratio": Mean(ratio.detach().sum(), len(ratio)),
            "log_odds_chosen": Mean(log_odds.detach().sum(), len(log_odds)),
        }
        odds = -self.beta * weighted(ratio, batch, "chosen").sum()
        return Loss({"nll": weighted(nll, batch, "chosen").sum(), "odds": odds}, metrics)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − exp(x)) of x < 0, exact near 0 and far from it."""
    near = x > -0.6931471805599453  # ln 2: where 1 − exp(x) would lose digits
    # The branch not taken gets a harmless argument, for its gradient would be NaN.
    close = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, close, far)
