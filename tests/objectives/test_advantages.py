"""Advantages by hand, and what may not change them."""

import math

import pytest
import torch

from lora_engine.objectives.advantages import (
    generalised_advantages,
    group_advantages,
    leave_one_out,
)

NAN = math.nan


def rewards(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_a_group_by_hand():
    values, equal = group_advantages(rewards(1, 2, 3, 5, 5, 5), 3)
    assert values.tolist() == pytest.approx([-1 / 1.0001, 0, 1 / 1.0001, 0, 0, 0])
    assert equal.tolist() == [False] * 3 + [True] * 3
    plain, _ = group_advantages(rewards(1, 2, 3, 5, 5, 5), 3, scale="none")
    assert plain.tolist() == [-1, 0, 1, 0, 0, 0]
    batch, _ = group_advantages(rewards(1, 2, 3, 5, 5, 5), 3, scale="batch")
    deviation = rewards(1, 2, 3, 5, 5, 5).std().item()
    assert batch.tolist() == pytest.approx([x / (deviation + 1e-4) for x in plain.tolist()])


def test_a_completion_without_a_reward_has_no_advantage():
    values, equal = group_advantages(rewards(1, NAN, 3, NAN, NAN, NAN), 3, scale="none")
    assert values.tolist() == [-1, 0, 1, 0, 0, 0]
    assert equal.tolist() == [False] * 3 + [True] * 3
    assert leave_one_out(rewards(1, NAN, 3), 3).values.tolist() == [-2, 0, 2]
    assert leave_one_out(rewards(1, NAN, NAN), 3).values.tolist() == [0, 0, 0]


@pytest.mark.parametrize("value", [0.1, 1e9 + 0.1, 1e15 / 3, -1e-9])
def test_equal_rewards_have_no_advantage_however_large(value):
    same, others = [value] * 3, [0.0, 1.0, 2.0]
    for function in (group_advantages, leave_one_out):
        values, equal = function(rewards(*same, *others), 3)
        assert values[:3].tolist() == [0, 0, 0]
        assert equal.tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_scaled_and_moved_rewards_have_the_same_advantages(scale):
    own = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = group_advantages(own, 4, scale=scale).values
    moved = group_advantages(1000 * own - 7, 4, scale=scale).values
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=0)


def test_the_order_in_a_group_and_of_groups_does_not_matter():
    own = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = torch.tensor([9, 8, 11, 10, 0, 3, 2, 1, 5, 4, 7, 6])
    for function in (group_advantages, leave_one_out):
        expected = function(own, 4).values[order]
        torch.testing.assert_close(function(own[order], 4).values, expected)


def test_others_are_the_baseline():
    values, equal = leave_one_out(rewards(1, 2, 6, 4, 4, 4), 3)
    assert values.tolist() == [-3, -1.5, 4.5, 0, 0, 0]
    assert equal.tolist() == [False] * 3 + [True] * 3


def test_generalised_advantages_by_hand():
    """δ = 0.9·2 − 1, 0.9·3 − 2 and 10 − 3; with λ = 0.5 each adds 0.45 of the next."""
    values, reward = rewards(1, 2, 3), rewards(0, 0, 10)
    advantages, returns = generalised_advantages(reward, values, discount=0.9, trace=0.5)
    last, second = 7.0, 0.7 + 0.45 * 7.0
    assert advantages.tolist() == pytest.approx([0.8 + 0.45 * second, second, last])
    assert returns.tolist() == pytest.approx((advantages + values).tolist())
    plain, returns = generalised_advantages(reward, values, discount=1.0, trace=1.0)
    assert returns.tolist() == [10, 10, 10] and plain.tolist() == [9, 8, 7]
