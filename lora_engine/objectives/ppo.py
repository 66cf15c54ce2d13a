"""Proximal policy optimisation: a clipped policy and a clipped value loss (arXiv:1707.06347)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from lora_engine.data.batch import PackedBatch
from lora_engine.objectives.base import Loss, Mean, Reads, TargetScores
from lora_engine.objectives.sequences import at_targets
from lora_engine.objectives.settings import check_not_negative, check_positive


@dataclass(frozen=True)
class PPO:
    """The mean over sampled tokens of

        −min(r A, clip(r, 1 − ε, 1 + ε) A)  +  value_weight / 2 max((v − R)², (v̄ − R)²)

    less entropy_weight times the entropy; r = exp(log p − old), v the scalar head's value before
    the token, v̄ the value kept within value_clip of the old one, R the return.

    Columns of a batch, [U] each: `advantages`, `old_logprobs`, `old_values`, `returns`.
    """

    clip: float = 0.2
    value_clip: float = 0.2
    value_weight: float = 0.1
    entropy_weight: float = 0.0
    temperature: float = 1.0
    name: ClassVar[str] = "ppo"
    unit: ClassVar[str] = "advantage per token"

    def __post_init__(self) -> None:
        check_positive(clip=self.clip, temperature=self.temperature)
        check_not_negative(
            value_clip=self.value_clip,
            value_weight=self.value_weight,
            entropy_weight=self.entropy_weight,
        )

    @property
    def reads(self) -> Reads:
        return Reads(
            each_logprob=True, entropy=True, temperature=self.temperature, values="targets"
        )

    def weight(self, batch: PackedBatch) -> int:
        """Its sampled tokens."""
        return batch.num_targets

    def __call__(self, scores: TargetScores, batch: PackedBatch) -> Loss:
        """Σ over tokens."""
        assert scores.values is not None and scores.entropy is not None, "it reads both"
        names = ("advantages", "old_logprobs", "old_values", "returns")
        advantages, old, old_values, returns = (
            at_targets(batch.columns[name].to(scores.logprobs), batch) for name in names
        )
        ratios = torch.exp(scores.logprobs - old)
        clipped = ratios.clamp(1 - self.clip, 1 + self.clip)
        policy = -torch.minimum(ratios * advantages, clipped * advantages)
        near = old_values + (scores.values - old_values).clamp(-self.value_clip, self.value_clip)
        errors = (scores.values - returns).square(), (near - returns).square()
        value = torch.maximum(*errors) / 2
        total = policy + self.value_weight * value - self.entropy_weight * scores.entropy
        outside = ((ratios - 1).abs() > self.clip).to(ratios.dtype)
        moved = {
            "policy_loss": policy,
            "value_loss": value,
            "entropy": scores.entropy,
            "clip_ratio/region_mean": outside,
        }
        metrics = {name: Mean(x.detach().sum(), len(x)) for name, x in moved.items()}
        return Loss(total.sum(), metrics)
