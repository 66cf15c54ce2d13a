"""A slip in an objective is one line that names the objective, wherever it is asked."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest
import torch
from training_helpers import (
    EVAL,
    TRAIN,
    lines,
    make_examples,
    one_batch,
    tiny_lora,
)

from lora_engine import TrainConfig, Trainer, UserError, preflight
from lora_engine.evaluation.batch_loss import batch_loss
from lora_engine.evaluation.heldout import evaluate
from lora_engine.objectives.answers import WHOLE, loss_of, weight_of
from lora_engine.objectives.base import Loss, Mean, Reads, TargetScores
from lora_engine.objectives.sft import SFT


def targets(batch):
    return batch.num_targets


@dataclass(frozen=True)
class Mine:
    """An objective of two functions."""

    loss: object = lambda scores: Loss(-scores.total)
    of_batch: object = field(default=targets)
    name: ClassVar[str] = "mine"
    unit: ClassVar[str] = ""
    reads: ClassVar[Reads] = Reads()

    def weight(self, batch):
        return self.of_batch(batch)

    def __call__(self, scores, batch):
        return self.loss(scores)


@pytest.fixture(scope="module")
def batch():
    return one_batch(make_examples(3))


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf, None, "3", torch.ones(2)])
def test_a_weight_that_is_no_number_is_refused(batch, weight):
    with pytest.raises(UserError, match="objective mine: its weight of a batch is"):
        weight_of(Mine(of_batch=lambda batch: weight), batch)


@pytest.mark.parametrize("weight", [3, 3.0, np.float32(3), np.int64(3), torch.tensor(3)])
def test_a_weight_is_a_number_of_any_library(batch, weight):
    result = weight_of(Mine(of_batch=lambda batch: weight), batch)
    assert result == {WHOLE: 3.0} and type(result[WHOLE]) is float


SCORES = TargetScores(torch.zeros(4), torch.zeros(()), torch.ones(4, dtype=torch.bool))
WRONG = {
    "each target's": (lambda s: Loss(-s.logprobs), r"its loss is a tensor \[4\] of float32; sum"),
    "one dimension": (lambda s: Loss(-s.total[None]), r"its loss is a tensor \[1\]"),
    "a count": (lambda s: Loss(s.correct.sum()), r"its loss is a tensor \[\] of int64"),
    "a number": (lambda s: Loss(1.0), "its loss is 1.0"),
    "a bare tensor": (lambda s: -s.total, r"returns a tensor \[\] of float32, expected an obj"),
    "nothing": (lambda s: None, "returns NoneType"),
    "bare metric": (lambda s: Loss(s.total, {"m": s.total}), "its metric 'm' is made of a tensor"),
    "metric's number": (lambda s: Loss(s.total, {"m": Mean(1.0, 1)}), "'m' is made of 1.0 and 1;"),
    "metric's shape": (lambda s: Loss(s.total, {"m": Mean(s.logprobs, 1)}), r"a tensor \[4\]"),
    "metric's count": (lambda s: Loss(s.total, {"m": Mean(s.total, s.total)}), "and a tensor"),
    "count below 0": (lambda s: Loss(s.total, {"m": Mean(s.total, -1)}), "and -1; give"),
    "metric's name": (lambda s: Loss(s.total, {3: Mean(s.total, 1)}), "its metric 3"),
    "metrics in a list": (lambda s: Loss(s.total, [Mean(s.total, 1)]), "its metrics are list"),
}


@pytest.mark.parametrize("kind", list(WRONG))
def test_a_loss_of_the_wrong_kind_is_refused(kind):
    loss, message = WRONG[kind]
    with pytest.raises(UserError, match=f"^objective mine: .*{message}") as caught:
        loss_of(Mine(loss), SCORES, None)
    assert "\n" not in str(caught.value)


def test_single_log_probabilities_without_a_gradient_are_not_differentiated(batch):
    """The part of the gradient that goes through them would be missing."""
    model = tiny_lora(init_lora_weights=False)
    objective = Mine(lambda scores: Loss(-scores.total + scores.logprobs.square().sum()))
    loss = batch_loss(model, batch, objective).total
    with pytest.raises(UserError, match=r"objective mine: .* Reads\(each_logprob=True\)"):
        loss.backward()
    with pytest.raises(UserError, match="objective mine"):
        preflight(model, batch, objective=objective)

    weighted = Mine(lambda s: Loss(-s.total * s.logprobs.detach().exp().mean()))
    batch_loss(model, batch, weighted).total.backward()
    means = Mine(lambda s: Loss(-s.total, {"logprob": Mean(s.logprobs.sum(), len(s.logprobs))}))
    batch_loss(model, batch, means).total.backward()


def test_batches_without_targets_measure_nothing():
    """Whatever weight the objective gives them: there is no accuracy."""
    from dataclasses import replace

    examples = [replace(e, supervised=[False] * len(e.input_ids)) for e in make_examples(2)]
    with pytest.raises(UserError, match=r"no supervised tokens .*\(mine\)"):
        evaluate(tiny_lora(), [one_batch(examples)], Mine(of_batch=lambda batch: 1))


def make_trainer(folder, objective):
    config = TrainConfig(output_dir=folder, max_steps=1, tokens_per_batch=64)
    return Trainer(tiny_lora(), None, TRAIN, EVAL, config, objective=objective)


@pytest.mark.parametrize("objective", [SFT, "sft", lambda scores, batch: -scores.total])
def test_what_is_no_objective_is_refused_before_anything_runs(tmp_path, batch, objective):
    message = r"objective is \S+, expected an instance of a dataclass"
    with pytest.raises(UserError, match=f"Trainer: {message}"):
        make_trainer(tmp_path, objective)
    with pytest.raises(UserError, match=f"preflight: {message}"):
        preflight(tiny_lora(), batch, objective=objective)


def test_an_objective_that_lacks_a_part_is_refused(tmp_path):
    @dataclass
    class Half:
        name = "half"

    with pytest.raises(UserError, match="objective Half lacks unit, reads, weight, __call__"):
        make_trainer(tmp_path, Half())


@pytest.mark.parametrize("name", ["accuracy", "step"])
def test_a_metric_whose_name_is_taken_is_refused(tmp_path, name):
    objective = Mine(lambda scores: Loss(-scores.total, {name: Mean(scores.total.detach(), 1)}))
    with pytest.raises(UserError, match=f"the objective's metrics .*{name}: .* other names"):
        make_trainer(tmp_path, objective).fit()


def test_numbers_of_other_libraries_are_trained_with(tmp_path):
    objective = Mine(of_batch=lambda batch: torch.tensor(float(batch.num_targets)))
    make_trainer(tmp_path / "tensor", objective).fit()
    make_trainer(tmp_path / "sft", SFT()).fit()
    assert [x["loss"] for x in lines(tmp_path / "tensor") if "loss" in x] == [
        x["loss"] for x in lines(tmp_path / "sft") if "loss" in x
    ]
