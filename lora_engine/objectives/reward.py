"""A reward model: one number for an answer, higher for the better of two."""

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from lora_engine.data.batch import PackedBatch
from lora_engine.objectives.base import Loss, Mean, Reads, TargetScores
from lora_engine.objectives.sequences import of_role, sides, weight_of, weighted
from lora_engine.objectives.settings import check_not_negative


@dataclass(frozen=True)
class Reward:
    """−log σ(r(chosen) − r(rejected) − margin) of each pair (Bradley and Terry, 1952; the margin
    as in arXiv:2307.09288), r being the scalar head's value at the last token.

    margin: by how much the better answer has to win where a record gives no `margin` of its own.
    centre: weight of (r(chosen) + r(rejected))², which keeps rewards around 0 (arXiv:2312.09244).
    """

    margin: float = 0.0
    centre: float = 0.0
    name: ClassVar[str] = "reward"
    unit: ClassVar[str] = "nats per pair"
    reads: ClassVar[Reads] = Reads(values="examples", examples="pairs", weights=True)

    def __post_init__(self) -> None:
        check_not_negative(centre=self.centre)

    def weight(self, batch: PackedBatch) -> float:
        """Its pairs."""
        return weight_of(batch, "chosen")

    def __call__(self, scores: TargetScores, batch: PackedBatch) -> Loss:
        """Σ over pairs."""
        assert scores.values is not None, "it reads the values of examples"
        chosen, rejected = sides(scores.values, batch)
        margins = chosen - rejected
        aimed = margins - self.margin
        if "margin" in batch.columns:
            aimed = margins - of_role(batch.columns["margin"].to(margins), batch, "chosen")
        total = -weighted(logsigmoid(aimed), batch, "chosen").sum()
        if self.centre:
            squares = weighted((chosen + rejected).square(), batch, "chosen")
            total = total + self.centre * squares.sum()
        count, won = len(margins), (margins > 0).to(margins.dtype)
        metrics = {
            "rewards/chosen": Mean(chosen.detach().sum(), count),
            "rewards/rejected": Mean(rejected.detach().sum(), count),
            "rewards/accuracies": Mean(won.sum(), count),
            "rewards/margins": Mean(margins.detach().sum(), count),
        }
        return Loss(total, metrics)
