"""Direct preference optimisation: answers compared under the model and its reference."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lora_engine.data.batch import PackedBatch
from lora_engine.objectives.base import Loss, Reads, TargetScores
from lora_engine.objectives.sequences import (
    counts,
    log_ratios,
    pair_metrics,
    sides,
    sums,
    weight_of,
    weighted,
)
from lora_engine.objectives.settings import check_choice, check_positive

LossType = Literal["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust"]


@dataclass(frozen=True)
class DPO:
    """With h = log π(chosen)/π_ref(chosen) − log π(rejected)/π_ref(rejected), of each pair

        sigmoid       −(1 − ε) log σ(βh) − ε log σ(−βh)                 arXiv:2305.18290
        sigmoid_norm  the same, each answer's log-ratio over its tokens
        hinge         max(0, 1 − βh)                                    arXiv:2309.06657
        ipo           (h − 1/(2β))², log-ratios over their tokens       arXiv:2310.12036
        robust        (−(1 − ε) log σ(βh) + ε log σ(−βh)) / (1 − 2ε)    arXiv:2403.00409

    and the mean over pairs, by the weights of their records. With a fresh adapter h is 0, and the
    loss of `sigmoid` ln 2.

    beta: how far the model may move; larger stays closer to the reference.
    label_smoothing: ε, the share of pairs whose answers are taken to be the wrong way round.
    """

    loss_type: LossType = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    name: ClassVar[str] = "dpo"
    unit: ClassVar[str] = "nats per pair"
    reads: ClassVar[Reads] = Reads(
        each_logprob=True, reference=True, examples="pairs", weights=True
    )

    def __post_init__(self) -> None:
        check_choice(get_args(LossType), loss_type=self.loss_type)
        check_positive(beta=self.beta)
        smooths = self.loss_type in ("sigmoid", "sigmoid_norm", "robust")
        if not 0 <= self.label_smoothing < 0.5 or (self.label_smoothing and not smooths):
            wanted = "0 to below 0.5" if smooths else f"0 with {self.loss_type}"
            raise ValueError(f"label_smoothing: expected {wanted}, got {self.label_smoothing!r}")

    def weight(self, batch: PackedBatch) -> float:
        """Its pairs."""
        return weight_of(batch, "chosen")

    def __call__(self, scores: TargetScores, batch: PackedBatch) -> Loss:
        """Σ over pairs; rewards are β times the log-ratios."""
        ratios = sums(log_ratios(scores), batch)
        compared = ratios
        if self.loss_type in ("sigmoid_norm", "ipo"):
            compared = ratios / counts(batch, ratios)
        chosen, rejected = sides(compared, batch)
        total = weighted(self._losses(chosen - rejected), batch, "chosen").sum()
        logps = sides(sums(scores.logprobs, batch), batch)
        return Loss(total, pair_metrics(sides(self.beta * ratios, batch), logps))

    def _losses(
        self,
        margins: Tensor,  # [P]: h
    ) -> Tensor:
        """[P]"""
        if self.loss_type == "hinge":
            return torch.relu(1 - self.beta * margins)
        if self.loss_type == "ipo":
            return (margins - 1 / (2 * self.beta)).square()
        right, wrong = logsigmoid(self.beta * margins), logsigmoid(-self.beta * margins)
        smooth = self.label_smoothing
        if self.loss_type == "robust":
            return (smooth * wrong - (1 - smooth) * right) / (1 - 2 * smooth)
        return -(1 - smooth) * right - smooth * wrong
