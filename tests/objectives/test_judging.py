"""What GRPO and PPO make of rewarded completions, against formulas written out."""

import math

import pytest
import torch

from lora_engine.objectives.grpo import GRPO
from lora_engine.objectives.online import OnlineObjective, Sampled
from lora_engine.objectives.ppo import PPO
from lora_engine.objectives.sft import SFT

REWARDS = torch.tensor([1.0, 2.0, 4.0, 3.0, 3.0, 3.0], dtype=torch.float64)


def advantages(objective, rewards=REWARDS, size=3):
    logprobs = [torch.zeros(2)] * len(rewards)
    judged = objective.judge(Sampled(rewards, size, logprobs))
    return [column["advantages"] for column in judged.columns], judged.equal.tolist()


def test_what_learns_online():
    assert isinstance(GRPO(), OnlineObjective)
    assert isinstance(PPO(), OnlineObjective)
    assert not isinstance(SFT(), OnlineObjective)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "gspo", "cispo", "sapo"])
def test_a_group_is_standardised(loss_type):
    values, equal = advantages(GRPO(loss_type=loss_type))
    mean, deviation = 7 / 3, math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2)
    expected = [(reward - mean) / (deviation + 1e-4) for reward in (1, 2, 4)]
    assert values == pytest.approx([*expected, 0, 0, 0], rel=1e-6)
    assert equal == [False] * 3 + [True] * 3


def test_without_scaling_and_by_the_batch():
    values, _ = advantages(GRPO(loss_type="dr_grpo", scale_rewards="none"))
    assert values == pytest.approx([-4 / 3, -1 / 3, 5 / 3, 0, 0, 0])
    values, _ = advantages(GRPO(scale_rewards="batch"))
    deviation = REWARDS.std().item() + 1e-4
    assert values == pytest.approx(
        [-4 / 3 / deviation, -1 / 3 / deviation, 5 / 3 / deviation, 0, 0, 0]
    )


@pytest.mark.parametrize("loss_type", ["rloo", "reinforce"])
def test_leaving_one_out(loss_type):
    values, _ = advantages(GRPO(loss_type=loss_type))
    assert values == pytest.approx([1 - 3, 2 - 2.5, 4 - 1.5, 0, 0, 0])


def test_the_order_of_a_group_and_the_scale_of_rewards():
    order = [2, 0, 1]
    values, _ = advantages(GRPO(), REWARDS[:3])
    turned, _ = advantages(GRPO(), REWARDS[order])
    assert turned == pytest.approx([values[i] for i in order])
    scaled, _ = advantages(GRPO(), 1000 * REWARDS[:3] + 5)
    assert scaled == pytest.approx(values, rel=1e-3)


def test_ppo_by_hand():
    """Two completions of two and one tokens; γ = 0.9, λ = 0.5, a KL of 0.5 in the reward."""
    objective = PPO(discount=0.9, trace=0.5, kl_weight=0.5, whiten=False)
    sampled = Sampled(
        torch.tensor([2.0, 1.0], dtype=torch.float64),
        1,
        logprobs=[torch.tensor([-1.0, -2.0]), torch.tensor([-0.5])],
        values=[torch.tensor([0.3, 0.4]), torch.tensor([0.1])],
        reference=[torch.tensor([-1.2, -1.0]), torch.tensor([-0.5])],
    )
    judged = objective.judge(sampled)
    first, second = judged.columns
    last = (2.0 + 0.5) - 0.4
    before = -0.1 + 0.9 * 0.4 - 0.3
    assert first["advantages"] == pytest.approx([before + 0.9 * 0.5 * last, last], rel=1e-5)
    assert first["returns"] == pytest.approx([before + 0.45 * last + 0.3, last + 0.4], rel=1e-5)
    assert second["advantages"] == pytest.approx([0.9])
    assert first["old_logprobs"] == [-1.0, -2.0]
    assert first["old_values"] == pytest.approx([0.3, 0.4])
    assert judged.metrics["kl"] == pytest.approx((0.2 - 1.0 + 0.0) / 2)
    whitened = PPO(discount=0.9, trace=0.5, kl_weight=0.5).judge(sampled)
    every = torch.tensor([x for column in whitened.columns for x in column["advantages"]])
    assert every.mean().item() == pytest.approx(0, abs=1e-6)
    assert every.std(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_ppo_learns_nothing_of_a_completion_without_a_reward():
    sampled = Sampled(
        torch.tensor([math.nan, 1.0], dtype=torch.float64),
        1,
        logprobs=[torch.tensor([-1.0]), torch.tensor([-1.0])],
        values=[torch.tensor([0.7]), torch.tensor([0.2])],
    )
    unknown, _ = PPO(whiten=False).judge(sampled).columns
    assert unknown["advantages"] == [0.0]
    assert unknown["returns"] == pytest.approx([0.7])
