"""Proximal policy optimisation: a clipped policy and a clipped value loss (arXiv:1707.06347)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from lora_engine.data.batch import PackedBatch
from lora_engine.objectives.advantages import EPSILON, generalised_advantages
from lora_engine.objectives.base import Loss, Mean, Reads, TargetScores
from lora_engine.objectives.online import Judged, Sampled
from lora_engine.objectives.sequences import at_targets
from lora_engine.objectives.settings import check_not_negative, check_positive, check_share


@dataclass(frozen=True)
class PPO:
    """The mean over sampled tokens of

        −min(r A, clip(r, 1 − ε, 1 + ε) A)  +  value_weight / 2 max((v − R)², (v̄ − R)²)

    less entropy_weight times the entropy; r = exp(log p − old), v the scalar head's value before
    the token, v̄ the value kept within value_clip of the old one, R the return.

    Columns of a batch, [U] each: `advantages`, `old_logprobs`, `old_values`, `returns`.

    kl_weight: of log p − ref, which is taken from the reward at every token (ref: the model without
        its adapters); the completion's own reward comes at its last token.
    discount, trace: γ and λ of the generalised advantages (arXiv:1506.02438).
    whiten: advantages less their mean, over their standard deviation, over all tokens of a round.
    """

    clip: float = 0.2
    value_clip: float = 0.2
    value_weight: float = 0.1
    kl_weight: float = 0.05
    discount: float = 1.0
    trace: float = 0.95
    whiten: bool = True
    entropy_weight: float = 0.0
    temperature: float = 1.0
    name: ClassVar[str] = "ppo"
    unit: ClassVar[str] = "advantage per token"
    measures: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(clip=self.clip, temperature=self.temperature)
        check_share(discount=self.discount, trace=self.trace)
        check_not_negative(
            value_clip=self.value_clip,
            value_weight=self.value_weight,
            kl_weight=self.kl_weight,
            entropy_weight=self.entropy_weight,
        )

    @property
    def reads(self) -> Reads:
        return Reads(
            each_logprob=True, entropy=True, temperature=self.temperature, values="targets"
        )

    @property
    def compares(self) -> bool:
        """Where the distance costs anything."""
        return self.kl_weight != 0

    def judge(self, sampled: Sampled) -> Judged:
        """Each token's advantage, the return, and what the model says of it before it learns.

        A completion without a reward teaches nothing: its advantages are 0, its returns its values.
        """
        columns: list[dict[str, list[float]]] = []
        known = ~torch.isnan(sampled.rewards)
        advantages, moved = [], 0.0
        for number, (old, values) in enumerate(zip(sampled.logprobs, sampled.values, strict=True)):
            kl = old - sampled.reference[number] if sampled.reference else torch.zeros_like(old)
            moved += float(kl.sum())
            gained = -self.kl_weight * kl
            made, returns = torch.zeros_like(old), values
            if known[number]:
                gained[-1] += float(sampled.rewards[number])
                made, returns = generalised_advantages(
                    gained, values, discount=self.discount, trace=self.trace
                )
            advantages.append(made)
            columns.append(
                {
                    "old_logprobs": old.tolist(),
                    "old_values": values.tolist(),
                    "returns": returns.tolist(),
                }
            )
        if self.whiten and known.any():
            rewarded = [a for a, has in zip(advantages, known.tolist(), strict=True) if has]
            every = torch.cat(rewarded)
            deviation = every.std(correction=0) + EPSILON
            advantages = [
                (a - every.mean()) / deviation if has else a
                for a, has in zip(advantages, known.tolist(), strict=True)
            ]
        for column, made in zip(columns, advantages, strict=True):
            column["advantages"] = made.tolist()
        equal = torch.zeros(len(columns), dtype=torch.bool)
        metrics = {"kl": moved / max(len(columns), 1)} if sampled.reference else {}
        return Judged(columns, equal, metrics)

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
