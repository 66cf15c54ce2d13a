"""Advantages of sampled completions: how much better each is than what was to be expected."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

# Keeps a group of nearly equal rewards from being blown up.
EPSILON = 1e-4


class Advantages(NamedTuple):
    """values: [n], 0 for a completion without a reward. equal: [n] bool, whether the rewards of its
    group are all the same, so that it teaches nothing."""

    values: Tensor
    equal: Tensor


def group_advantages(
    rewards: Tensor,  # [n] float; NaN where there is none
    size: int,
    *,
    scale: Literal["group", "batch", "none"] = "group",
) -> Advantages:
    """Each reward less its group's mean, over a standard deviation (of samples, n − 1).

    A group is `size` completions in a row, of one prompt. scale: whose standard deviation: the
    group's, that of all, or none at all (arXiv:2503.20783).
    """
    grouped = rewards.view(-1, size)
    equal = _equal(grouped)
    centred = (grouped - torch.nanmean(grouped, 1, keepdim=True)).masked_fill(equal, 0.0)
    deviation = _deviation(centred)
    if scale == "group":
        centred = centred / (deviation[:, None] + EPSILON)
    elif scale == "batch":
        every = rewards - torch.nanmean(rewards)
        centred = centred / (_deviation(every[None]) + EPSILON)
    return Advantages(torch.nan_to_num(centred.reshape(-1), nan=0.0), equal.reshape(-1))


def leave_one_out(
    rewards: Tensor,  # [n] float; NaN where there is none
    size: int,
) -> Advantages:
    """Each reward less the mean of the others of its group (arXiv:2402.14740)."""
    grouped = rewards.view(-1, size)
    known = ~torch.isnan(grouped)
    others = known.sum(1, keepdim=True) - 1
    total = torch.nansum(grouped, 1, keepdim=True)
    baseline = (total - grouped) / others.clamp(min=1)
    equal = _equal(grouped)
    values = torch.where(known & ~equal, grouped - baseline, 0.0)
    return Advantages(values.reshape(-1), equal.reshape(-1))


def generalised_advantages(
    rewards: Tensor,  # [n]: at each token of one completion
    values: Tensor,  # [n]: of the state before each token
    *,
    discount: float = 1.0,
    trace: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), [n] each, of one completion (arXiv:1506.02438).

    With δ_t = r_t + γ v_{t+1} − v_t, A_t = δ_t + γ λ A_{t+1} and R_t = A_t + v_t.
    discount: γ. trace: λ. The state behind the last token has the value 0: the completion ended.
    """
    advantages = torch.empty_like(values)
    following = advantage = 0.0
    for place in range(len(values) - 1, -1, -1):
        delta = float(rewards[place]) + discount * following - float(values[place])
        advantage = delta + discount * trace * advantage
        advantages[place] = advantage
        following = float(values[place])
    return advantages, advantages + values


def _equal(
    grouped: Tensor,  # [g, n], NaN where there is none
) -> Tensor:
    """[g, n]: whether a group's rewards are all the same; the sums of large ones would not tell."""
    largest = grouped.nan_to_num(nan=-torch.inf).amax(1, keepdim=True)
    least = grouped.nan_to_num(nan=torch.inf).amin(1, keepdim=True)
    return (largest - least <= 1e-8).expand_as(grouped)


def _deviation(
    centred: Tensor,  # [g, n], NaN where there is none
) -> Tensor:
    """[g]: the standard deviation of samples; 0 for fewer than two."""
    count = (~torch.isnan(centred)).sum(1)
    squares = torch.nansum(centred.square(), 1)
    return (squares / (count - 1).clamp(min=1)).sqrt()
