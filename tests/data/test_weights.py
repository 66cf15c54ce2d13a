"""Weights of records and messages multiply the loss of exactly their tokens."""

from dataclasses import dataclass

import pytest
import torch

from lora_engine.data.batch import collate
from lora_engine.data.dataset import prepare
from lora_engine.data.recipe import NO_WEIGHT, NOT_LEARNED
from lora_engine.data.render import WEIGHT
from lora_engine.errors import UserError
from lora_engine.objectives.base import TargetScores
from lora_engine.objectives.sft import SFT
from lora_engine.objectives.weighted import WeightedSFT, with_weights


def chat(*weights: float | None) -> dict[str, object]:
    messages: list[dict[str, object]] = []
    for weight in weights:
        answer: dict[str, object] = {"role": "assistant", "content": "Yes"}
        messages += [{"role": "user", "content": "Hi"}, answer]
        if weight is not None:
            answer["weight"] = weight
    return {"messages": messages}


def test_a_message_of_weight_0_is_not_learned(tokenizer):
    one, other = prepare([chat(0, 1), chat(None)], tokenizer)
    assert one.num_targets == other.num_targets
    assert one.columns == other.columns == {}
    dataset = prepare([chat(0), {**chat(1), "weight": 0}, chat(1)], tokenizer)
    assert [drop.reason for drop in dataset.dropped] == [NOT_LEARNED, NO_WEIGHT]


def test_weights_of_messages_and_records_multiply(tokenizer):
    example = prepare([{**chat(0.5, None, 3), "weight": 2}], tokenizer)[0]
    third = example.num_targets // 3
    assert example.columns[WEIGHT] == [1.0] * third + [2.0] * third + [6.0] * third
    assert prepare([{"text": "a b", "weight": "0.25"}], tokenizer)[0].columns == {WEIGHT: 0.25}


def test_a_batch_has_a_weight_for_each_target(tokenizer):
    dataset = prepare([chat(0.5, 3), {"text": "a b c", "weight": 4}, {"text": "d"}], tokenizer)
    batch = collate(dataset)
    half = dataset[0].num_targets // 2
    counts = batch.target_counts
    expected = [0.5] * half + [3.0] * half + [4.0] * counts[1] + [1.0] * counts[2]
    assert batch.columns[WEIGHT].tolist() == expected


def test_the_loss_is_the_weighted_mean(tokenizer):
    batch = collate(prepare([chat(0.5, 3), {"text": "a b c"}], tokenizer))
    logprobs = -torch.rand(batch.num_targets, dtype=torch.float64, requires_grad=True)
    correct = torch.zeros(batch.num_targets, dtype=torch.bool)
    scores = TargetScores(logprobs, logprobs.sum(), correct)
    weights = batch.columns[WEIGHT].double()
    objective = WeightedSFT()
    loss = objective(scores, batch).total / objective.weight(batch)
    assert loss.item() == pytest.approx((-(logprobs * weights).sum() / weights.sum()).item())
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, -weights / weights.sum())


def test_equal_weights_are_no_weights(tokenizer):
    texts = ["a b c", "d"]
    batch = collate(prepare([{"text": text, "weight": 7} for text in texts], tokenizer))
    logprobs = -torch.rand(batch.num_targets, dtype=torch.float64)
    scores = TargetScores(logprobs, logprobs.sum(), torch.zeros(batch.num_targets).bool())
    losses = [o(scores, batch).total / o.weight(batch) for o in (SFT(), WeightedSFT())]
    torch.testing.assert_close(*losses)


def test_the_objective_takes_the_weights_or_says_that_it_does_not(tokenizer):
    plain, weighted = (prepare([chat(weight)], tokenizer) for weight in (None, 0.5))
    assert with_weights(SFT(), [plain]) == SFT()
    assert with_weights(SFT(), [plain, weighted]) == WeightedSFT()
    assert with_weights(WeightedSFT(), [plain]) == WeightedSFT()

    @dataclass(frozen=True)
    class Other:
        name = "other"

    with pytest.raises(UserError, match="has records or messages with a 'weight', which the objec"):
        with_weights(Other(), [weighted])
