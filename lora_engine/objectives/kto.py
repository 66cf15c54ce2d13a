"""Kahneman-Tversky optimisation: answers judged one by one, good or bad."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lora_engine.data.batch import PackedBatch
from lora_engine.objectives.base import Loss, Mean, Reads, TargetScores
from lora_engine.objectives.sequences import log_ratios, of_role, sums, weight_of, weighted
from lora_engine.objectives.settings import check_choice, check_not_negative, check_positive

LossType = Literal["kto", "apo_zero"]


@dataclass(frozen=True)
class KTO:
    """With r = log π(answer)/π_ref(answer), the mean over answers of

        kto        1 − σ(β(r − z)) of a good one, 1 − σ(β(z − r)) of a bad one    arXiv:2402.01306
        apo_zero   1 − σ(βr), σ(βr)                                               arXiv:2408.06266

    each times its weight and its record's. z is how far the model has moved, the mean r of answers
    to other prompts, or 0 where that is less: one number for all batches of a step, and not
    differentiated.
    """

    loss_type: LossType = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    name: ClassVar[str] = "kto"
    unit: ClassVar[str] = "per answer"

    def __post_init__(self) -> None:
        check_choice(get_args(LossType), loss_type=self.loss_type)
        check_positive(beta=self.beta)
        check_not_negative(
            desirable_weight=self.desirable_weight, undesirable_weight=self.undesirable_weight
        )

    @property
    def reads(self) -> Reads:
        measured = self.loss_type == "kto"
        return Reads(
            each_logprob=True,
            reference=True,
            examples="labelled",
            mismatched=measured,
            weights=True,
        )

    def weight(self, batch: PackedBatch) -> float:
        """Its answers."""
        return weight_of(batch, "desirable", "undesirable")

    def __call__(self, scores: TargetScores, batch: PackedBatch) -> Loss:
        """Σ over answers; rewards are β times the log-ratios."""
        ratios, logps = sums(log_ratios(scores), batch), sums(scores.logprobs, batch)
        good, bad = (of_role(ratios, batch, role) for role in ("desirable", "undesirable"))
        moved = (
            batch.statistics["kl"].to(ratios) if self.loss_type == "kto" else ratios.new_zeros(())
        )
        good_losses = weighted(torch.sigmoid(self.beta * (moved - good)), batch, "desirable")
        bad_losses = weighted(torch.sigmoid(self.beta * (bad - moved)), batch, "undesirable")
        total = (
            self.desirable_weight * good_losses.sum() + self.undesirable_weight * bad_losses.sum()
        )
        rewards = self.beta * ratios.detach()
        metrics = {} if self.loss_type != "kto" else {"kl": Mean(moved, 1)}
        for role, name in (("desirable", "chosen"), ("undesirable", "rejected")):
            metrics[f"rewards/{name}"] = _mean(of_role(rewards, batch, role))
            metrics[f"logps/{name}"] = _mean(of_role(logps.detach(), batch, role))
        return Loss(total, metrics)


def _mean(values: Tensor) -> Mean:
    return Mean(values.sum(), len(values))
