"""Group-relative policy optimisation and its family: one file, for they differ by a line each."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lora_engine.data.batch import PackedBatch
from lora_engine.objectives.advantages import group_advantages, leave_one_out
from lora_engine.objectives.base import Loss, Mean, Reads, TargetScores
from lora_engine.objectives.online import Judged, Sampled
from lora_engine.objectives.sequences import at_targets, counts, means, spread, sums
from lora_engine.objectives.settings import check_choice, check_not_negative, check_positive

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "rloo", "reinforce"]
Scale = Literal["group", "batch", "none"]
Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
_OF_TOKENS = ("dapo", "cispo")
_OF_SEQUENCES = ("gspo", "rloo")
_LEAVING_OUT = ("rloo", "reinforce")


@dataclass(frozen=True)
class GRPO:
    """With r = exp(log p − old) and the advantage A, of each token

        grpo, bnpo, dr_grpo, dapo   −min(r A, clip(r, 1 − low, 1 + high) A)
        gspo        the same, r = exp(mean over its sequence of log p − old)    arXiv:2507.18071
        cispo       −stop(min(r, high)) A log p                                 arXiv:2506.13585
        sapo        −4/τ σ(τ(r − 1)) A, τ by the sign of A                      arXiv:2511.20347
        rloo        of each sequence, r = exp(Σ over it of log p − old), clipped arXiv:2402.14740
        reinforce   of each sequence, −A Σ log p

    summed and divided, over all batches of a step, by

        grpo, gspo, sapo   its sequence's tokens, then the sequences            arXiv:2402.03300
        rloo, reinforce    the sequences
        bnpo               the tokens of its micro-batch, then the micro-batches
        dr_grpo            the sequences times `max_completion_length`          arXiv:2503.20783
        dapo, cispo        the tokens                                           arXiv:2503.14476

    Columns of a batch: `advantages` [E] or [U]; `old_logprobs` [U] where the policy has moved since
    it was sampled; `sampler_logprobs` [U] where the sampler's numbers are not the trainer's.

    scale_rewards: whose standard deviation a reward's distance from its group's mean is divided
        by; rloo and reinforce take the mean of the others, and divide by nothing.
    epsilon_low, epsilon_high: how far r may leave 1; of cispo the largest r (5, say).
    delta: the largest r of a negative advantage; None: any (arXiv:2505.07291).
    kl_weight: of exp(ref − log p) − (ref − log p) − 1, the k3 estimate of the divergence from the
        model without its adapters.
    entropy_weight: of the mean entropy, which is subtracted.
    sampler_correction: what p_old / p_sampler of a token, or of its sequence, does to its loss: it
        is multiplied by it, but by sampler_cap at most (truncate), or by 0 above that (mask).
    """

    loss_type: LossType = "dapo"
    scale_rewards: Scale = "group"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.28
    delta: float | None = None
    kl_weight: float = 0.0
    entropy_weight: float = 0.0
    temperature: float = 1.0
    max_completion_length: int = 256
    sapo_positive: float = 1.0
    sapo_negative: float = 1.05
    sampler_correction: Correction = "token_truncate"
    sampler_cap: float = 3.0
    name: ClassVar[str] = "grpo"
    unit: ClassVar[str] = "advantage per token or sequence"

    def __post_init__(self) -> None:
        check_choice(get_args(LossType), loss_type=self.loss_type)
        check_choice(get_args(Scale), scale_rewards=self.scale_rewards)
        check_choice(get_args(Correction), sampler_correction=self.sampler_correction)
        check_positive(
            temperature=self.temperature,
            sampler_cap=self.sampler_cap,
            sapo_positive=self.sapo_positive,
            sapo_negative=self.sapo_negative,
            max_completion_length=self.max_completion_length,
        )
        check_not_negative(
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            kl_weight=self.kl_weight,
            entropy_weight=self.entropy_weight,
        )

    @property
    def reads(self) -> Reads:
        return Reads(
            each_logprob=True,
            entropy=True,
            reference=self.kl_weight != 0,
            temperature=self.temperature,
        )

    @property
    def measures(self) -> bool:
        """It has no values."""
        return False

    @property
    def compares(self) -> bool:
        """Its reference is that of each batch."""
        return False

    def judge(self, sampled: Sampled) -> Judged:
        """Each completion's advantage over the others of its group."""
        if self.loss_type in _LEAVING_OUT:
            advantages = leave_one_out(sampled.rewards, sampled.size)
        else:
            advantages = group_advantages(sampled.rewards, sampled.size, scale=self.scale_rewards)
        columns = [{"advantages": value} for value in advantages.values.float().tolist()]
        return Judged(columns, advantages.equal)

    def weight(self, batch: PackedBatch) -> dict[str, float]:
        """What its loss type divides by; and tokens, for the entropy."""
        tokens, sequences = batch.num_targets, batch.num_examples
        divisor: float = sequences
        if self.loss_type in _OF_TOKENS:
            divisor = tokens
        elif self.loss_type == "bnpo":
            divisor = min(tokens, 1)
        elif self.loss_type == "dr_grpo":
            divisor = sequences * self.max_completion_length
        return {"policy": divisor, "entropy": tokens}

    def __call__(self, scores: TargetScores, batch: PackedBatch) -> Loss:
        """Of the targets, the tokens that were sampled."""
        logprobs = scores.logprobs
        columns = {name: values.to(logprobs) for name, values in batch.columns.items()}
        old = columns.get("old_logprobs", logprobs.detach())
        advantages = at_targets(columns["advantages"], batch)
        ratios = self._ratios(logprobs - old, batch)
        losses = self._losses(ratios, advantages, logprobs)
        metrics = self._clipped(ratios.detach(), advantages, batch)
        if "sampler_logprobs" in columns and self.sampler_correction != "none":
            factors = self._corrections(old - columns["sampler_logprobs"], batch)
            losses = losses * factors
            metrics["sampling/importance_sampling_ratio"] = _mean(factors)
        if scores.reference is not None:
            difference = scores.reference - logprobs
            kl = torch.exp(difference) - difference - 1
            losses = losses + self.kl_weight * kl
            metrics["kl"] = _mean(kl.detach())
        assert scores.entropy is not None, "it reads the entropy"
        metrics["entropy"] = _mean(scores.entropy.detach())
        # Differentiated only where it counts: its gradient takes the logits once more.
        entropy = scores.entropy if self.entropy_weight else scores.entropy.detach()
        terms = {
            "policy": self._total(losses, batch),
            "entropy": -self.entropy_weight * entropy.sum(),
        }
        return Loss(terms, metrics)

    def _ratios(self, log_ratios: Tensor, batch: PackedBatch) -> Tensor:
        """[U]: each token's r."""
        if self.loss_type == "gspo":
            log_ratios = spread(means(log_ratios, batch), batch)
        elif self.loss_type == "rloo":
            log_ratios = spread(sums(log_ratios, batch), batch)
        return torch.exp(log_ratios)

    def _losses(self, ratios: Tensor, advantages: Tensor, logprobs: Tensor) -> Tensor:
        """[U]"""
        if self.loss_type == "reinforce":
            return -advantages * logprobs
        if self.loss_type == "cispo":
            return -ratios.detach().clamp(max=self.epsilon_high) * advantages * logprobs
        if self.loss_type == "sapo":
            positive = torch.full_like(ratios, self.sapo_positive)
            gates = torch.where(advantages > 0, positive, self.sapo_negative)
            return -4 / gates * torch.sigmoid(gates * (ratios - 1)) * advantages
        clipped = ratios.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        if self.delta is not None:
            ratios = ratios.clamp(max=self.delta)
        return -torch.minimum(ratios * advantages, clipped * advantages)

    def _total(self, losses: Tensor, batch: PackedBatch) -> Tensor:
        """The sum that `weight` divides."""
        if self.loss_type == "bnpo":
            return losses.mean()
        if self.loss_type in ("dr_grpo", "reinforce", *_OF_TOKENS):
            return losses.sum()
        # Of a ratio of whole sequences every token has its sequence's loss.
        return (sums(losses, batch) / counts(batch, losses)).sum()

    def _corrections(self, log_ratios: Tensor, batch: PackedBatch) -> Tensor:
        """[U]: what each token's loss is multiplied by for the sampler's sake."""
        level, _, how = self.sampler_correction.partition("_")
        if level == "sequence":
            log_ratios = spread(sums(log_ratios, batch), batch)
        factors = torch.exp(log_ratios.detach())
        if how == "truncate":
            return factors.clamp(max=self.sampler_cap)
        return factors.masked_fill(factors > self.sampler_cap, 0)

    def _clipped(self, ratios: Tensor, advantages: Tensor, batch: PackedBatch) -> dict[str, Mean]:
        """The shares of tokens, or of sequences, whose ratio is clipped."""
        if self.loss_type in ("sapo", "reinforce"):
            return {}
        high = self.epsilon_high if self.loss_type == "cispo" else 1 + self.epsilon_high
        above = ((ratios > high) & (advantages > 0)).to(ratios.dtype)
        if self.loss_type == "cispo":
            return {"cispo_clip_ratio": _mean(above)}
        below = ((ratios < 1 - self.epsilon_low) & (advantages < 0)).to(ratios.dtype)
        if self.loss_type in _OF_SEQUENCES:
            below, above = means(below, batch), means(above, batch)
        return {
            "clip_ratio/low_mean": _mean(below),
            "clip_ratio/high_mean": _mean(above),
            "clip_ratio/region_mean": _mean(below + above),
        }


def _mean(values: Tensor) -> Mean:
    return Mean(values.sum(), len(values))
