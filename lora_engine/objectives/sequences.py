"""From log-probabilities of targets to numbers of examples, and of the two sides of pairs."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lora_engine.data.batch import PackedBatch
from lora_engine.data.render import EXAMPLE_WEIGHT
from lora_engine.objectives.base import Mean, TargetScores


class Sides(NamedTuple):
    """A number for each pair's chosen and each pair's rejected answer."""

    chosen: Tensor  # [P]
    rejected: Tensor  # [P]


def sums(
    values: Tensor,  # [U]
    batch: PackedBatch,
) -> Tensor:
    """[E]: the sum over each example's targets, in a fixed order."""
    lengths = torch.tensor(batch.target_counts, device=values.device)
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True, initial=0)


def counts(batch: PackedBatch, like: Tensor) -> Tensor:
    """[E]: the number of each example's targets, at least 1."""
    numbers = [max(count, 1) for count in batch.target_counts]
    return torch.tensor(numbers, dtype=like.dtype, device=like.device)


def means(
    values: Tensor,  # [U]
    batch: PackedBatch,
) -> Tensor:
    """[E]: the mean over each example's targets; 0 for one without any."""
    return sums(values, batch) / counts(batch, values)


def spread(
    values: Tensor,  # [E]
    batch: PackedBatch,
) -> Tensor:
    """[U]: each example's number at each of its targets."""
    lengths = torch.tensor(batch.target_counts, device=values.device)
    return torch.repeat_interleave(values, lengths, output_size=batch.num_targets)


def at_targets(
    values: Tensor,  # [E] or [U]
    batch: PackedBatch,
) -> Tensor:
    """[U]: a number of each example, or of each target, at the targets."""
    return values if len(values) == batch.num_targets else spread(values, batch)


def weight_of(batch: PackedBatch, *roles: str) -> float:
    """The examples of the roles, each as often as its record weighs."""
    places = [place for role in roles for place in batch.with_role(role)]
    weights = batch.columns.get(EXAMPLE_WEIGHT)
    return len(places) if weights is None else float(weights.double()[places].sum())


def weighted(
    values: Tensor,  # [N]: of the examples of the role
    batch: PackedBatch,
    role: str,
) -> Tensor:
    """[N]: the values times the weights of their records."""
    weights = batch.columns.get(EXAMPLE_WEIGHT)
    return values if weights is None else values * of_role(weights.to(values), batch, role)


def sides(
    values: Tensor,  # [E]
    batch: PackedBatch,
) -> Sides:
    """The numbers of each pair, whose rejected example follows its chosen one."""
    return Sides(of_role(values, batch, "chosen"), of_role(values, batch, "rejected"))


def of_role(
    values: Tensor,  # [E]
    batch: PackedBatch,
    role: str,
) -> Tensor:
    """The numbers of the examples of a role, in their order."""
    places = torch.tensor(batch.with_role(role), dtype=torch.int64, device=values.device)
    return values.index_select(0, places)


def chosen_targets(batch: PackedBatch) -> int:
    """Targets of all chosen examples."""
    return sum(batch.target_counts[place] for place in batch.with_role("chosen"))


def chosen_targets_weight(batch: PackedBatch) -> float:
    """The same, each target as often as its record weighs."""
    weights = batch.columns.get(EXAMPLE_WEIGHT)
    if weights is None:
        return chosen_targets(batch)
    chosen = batch.with_role("chosen")
    counted = zip(weights.double()[chosen].tolist(), chosen, strict=True)
    return sum(weight * batch.target_counts[place] for weight, place in counted)


def pair_metrics(rewards: Sides, logps: Sides) -> Mapping[str, Mean]:
    """The metrics of pairs that people chart, each a mean over pairs."""
    chosen, rejected = (x.detach() for x in rewards)
    return {
        name: Mean(values.sum(), len(values))
        for name, values in {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "rewards/margins": chosen - rejected,
            "logps/chosen": logps.chosen.detach(),
            "logps/rejected": logps.rejected.detach(),
        }.items()
    }


def log_ratios(scores: TargetScores) -> Tensor:
    """[U]: log p(target) less that of the reference."""
    assert scores.reference is not None, "the objective reads the reference"
    return scores.logprobs - scores.reference
