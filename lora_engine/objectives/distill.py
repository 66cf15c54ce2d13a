"""Distillation: the model's distributions drawn to those of a teacher."""

from dataclasses import dataclass
from typing import ClassVar

from lora_engine.data.batch import PackedBatch
from lora_engine.objectives.base import Divergence, Loss, Mean, Reads, TargetScores, Teacher
from lora_engine.objectives.settings import check_positive, check_share


@dataclass(frozen=True)
class Distill:
    """(1 − cross_entropy) times the mean over targets of a divergence of the model's distribution
    from the teacher's, times temperature², plus cross_entropy times −log p(target).

    teacher: `Teacher(model)`, a model of the same vocabulary on the same device; an adapter of the
        model's own by its name; or "", the model without its adapters.
    beta: 0 is the forward KL, which covers what the teacher does; 1 the reverse KL, which keeps to
        what it does most; between them the generalised Jensen-Shannon divergence
        (arXiv:2306.13649).
    temperature: divides the logits of both; its square keeps gradients as large as at 1
        (arXiv:1503.02531).
    """

    teacher: Teacher | str = ""
    beta: float = 0.0
    temperature: float = 1.0
    cross_entropy: float = 0.0
    name: ClassVar[str] = "distill"
    unit: ClassVar[str] = "nats per token"

    def __post_init__(self) -> None:
        check_positive(temperature=self.temperature)
        check_share(beta=self.beta, cross_entropy=self.cross_entropy)

    @property
    def reads(self) -> Reads:
        return Reads(divergence=Divergence(self.teacher, self.beta, self.temperature))

    def weight(self, batch: PackedBatch) -> int:
        """Its targets."""
        return batch.num_targets

    def __call__(self, scores: TargetScores, batch: PackedBatch) -> Loss:
        """Σ over targets."""
        assert scores.divergence is not None, "it reads the divergence"
        total = (1 - self.cross_entropy) * self.temperature**2 * scores.divergence
        if self.cross_entropy:
            total = total - self.cross_entropy * scores.total
        metrics = {
            "divergence": Mean(scores.divergence.detach(), batch.num_targets),
            "cross_entropy": Mean(-scores.logprobs.detach().sum(), batch.num_targets),
        }
        return Loss(total, metrics)
