"""Contrastive preference optimisation: pairs compared without a reference."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
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
from lora_engine.objectives.settings import (
    check_choice,
    check_not_negative,
    check_positive,
    check_share,
)

LossType = Literal["sigmoid", "hinge", "ipo"]


@dataclass(frozen=True)
class CPO:
    """With h = log π(chosen) − log π(rejected), of each pair (arXiv:2401.08417)

        sigmoid   −(1 − ε) log σ(βh) − ε log σ(−βh)
        hinge     max(0, 1 − βh)
        ipo       (h − 1/(2β))², log-probabilities over their tokens

    plus nll_weight times the chosen answers' mean cross-entropy, which holds them up.
    """

    loss_type: LossType = "sigmoid"
    beta: float = 0.1
    nll_weight: float = 1.0
    label_smoothing: float = 0.0
    name: ClassVar[str] = "cpo"
    unit: ClassVar[str] = "nats per chosen token and pair"
    reads: ClassVar[Reads] = Reads(each_logprob=True, examples="pairs", weights=True)

    def __post_init__(self) -> None:
        check_choice(get_args(LossType), loss_type=self.loss_type)
        check_positive(beta=self.beta)
        check_not_negative(nll_weight=self.nll_weight)
        check_share(label_smoothing=self.label_smoothing)

    def weight(self, batch: PackedBatch) -> dict[str, float]:
        """Tokens of the chosen answers, and pairs."""
        return {"nll": chosen_targets_weight(batch), "preference": weight_of(batch, "chosen")}

    def __call__(self, scores: TargetScores, batch: PackedBatch) -> Loss:
        """Rewards are β times the log-probabilities."""
        of_examples = means if self.loss_type == "ipo" else sums
        logps = sides(of_examples(scores.logprobs, batch), batch)
        margins = logps.chosen - logps.rejected
        if self.loss_type == "hinge":
            losses = torch.relu(1 - self.beta * margins)
        elif self.loss_type == "ipo":
            losses = (margins - 1 / (2 * self.beta)).square()
        else:
            right, wrong = logsigmoid(self.beta * margins), logsigmoid(-self.beta * margins)
            losses = -(1 - self.label_smoothing) * right - self.label_smoothing * wrong
        nll = -of_role(sums(scores.logprobs, batch), batch, "chosen")
        rewards = Sides(self.beta * logps.chosen, self.beta * logps.rejected)
        metrics = {
            **pair_metrics(rewards, logps),
            "nll_loss": Mean(nll.detach().sum(), chosen_targets(batch)),
        }
        cross_entropy = self.nll_weight * weighted(nll, batch, "chosen").sum()
        preference = weighted(losses, batch, "chosen").sum()
        return Loss({"nll": cross_entropy, "preference": preference}, metrics)
