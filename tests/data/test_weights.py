"""Weights of records and messages multiply the loss of exactly their tokens."""

from dataclasses import dataclass, replace

import pytest
import torch
from objective_cases import EVERY, JUDGED, PAIRED, Numbers, examples_for
from torch import Tensor

from lora_engine.data.batch import collate
from lora_engine.data.dataset import prepare
from lora_engine.data.recipe import NO_WEIGHT, NOT_LEARNED
from lora_engine.data.render import EXAMPLE_WEIGHT, WEIGHT
from lora_engine.errors import UserError
from lora_engine.objectives.base import Reads, TargetScores
from lora_engine.objectives.domain import Domain
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


@dataclass(frozen=True)
class Other:
    name = "other"
    reads = Reads()


def test_the_objective_takes_the_weights_or_says_that_it_does_not(tokenizer):
    plain, weighted = (prepare([chat(weight)], tokenizer) for weight in (None, 0.5))
    assert with_weights(SFT(), [plain]) == SFT()
    assert with_weights(SFT(), [plain, weighted]) == WeightedSFT()
    assert with_weights(WeightedSFT(), [plain]) == WeightedSFT()
    with pytest.raises(UserError, match="has records or messages with a 'weight', which the objec"):
        with_weights(Other(), [weighted])
    assert with_weights(Domain(), [weighted]) == WeightedSFT()
    with pytest.raises(UserError, match="which the objective domain does not take"):
        with_weights(Domain(entropy_bonus=0.1), [weighted])


PAIR = {"prompt": "a ", "chosen": "b", "rejected": "c"}


def test_a_weight_of_a_pair_is_its_examples(tokenizer):
    dataset = prepare([{**PAIR, "weight": 2.5}, PAIR, {**PAIR, "weight": 0}], tokenizer)
    assert [drop.reason for drop in dataset.dropped] == [NO_WEIGHT]
    assert [example.columns for example in dataset] == [{EXAMPLE_WEIGHT: 2.5}, {}]
    assert collate(dataset).columns[EXAMPLE_WEIGHT].tolist() == [2.5, 2.5, 1, 1]
    with pytest.raises(UserError, match="which the objective other does not take"):
        with_weights(Other(), [dataset])
    with pytest.raises(UserError, match="a message of a compared or judged answer weighs 0 or 1"):
        answer = {"role": "assistant", "content": "b", "weight": 0.5}
        asked = [{"role": "user", "content": "a"}]
        prepare([{"prompt": asked, "chosen": [answer], "rejected": [answer]}], tokenizer)


@pytest.mark.parametrize("name", [*PAIRED, *JUDGED])
def test_a_weight_counts_as_that_many_records(name):
    """Whole numbers: records that weigh 3 are records that stand there three times."""
    objective, examples, times = EVERY[name], examples_for(name, 4), (1, 3, 2, 1)
    weighted = [
        replace(example, columns={EXAMPLE_WEIGHT: float(count)}) if count > 1 else example
        for example, count in zip(examples, times, strict=True)
    ]
    copies = [i for i, count in enumerate(times) for _ in range(count)]
    repeated = [examples[i] for i in copies]
    batches = [
        replace(collate(given), statistics={"kl": torch.tensor(0.03)})
        for given in (weighted, repeated)
    ]
    numbers = Numbers(batches[0], objective)
    leaf = next(iter(numbers.leaves))
    of_target = leaf == "logprobs"
    counts = batches[0].target_counts if of_target else (1,) * batches[0].num_examples
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    both = batches[0].num_examples // 4  # sequences of a record
    rows = torch.tensor(
        [row for i in copies for row in range(starts[both * i], starts[both * (i + 1)])]
    )
    losses, gradients = [], []
    for batch, places in zip(batches, (torch.arange(starts[-1]), rows), strict=True):
        values = numbers.leaves[leaf]
        given = {name: rest[places] for name, rest in numbers.rest.items()}
        taken = values[places]
        scores = TargetScores(
            taken if of_target else torch.zeros(0),
            taken.sum(),
            torch.zeros(len(places), dtype=torch.bool),
            values=None if of_target else taken,
            **given,
        )
        total, weight = objective(scores, batch).total, objective.weight(batch)
        if isinstance(total, Tensor):
            total, weight = {"": total}, {"": weight}
        loss = sum(total[term] / weight[term] for term in total)
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, values)[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)
