"""The term against forgetting: its value and every gradient against the formula in float64."""

import pytest
import torch
from objective_cases import examples_for
from training_helpers import make_examples, one_batch, tiny_lora

from lora_engine import UserError
from lora_engine.evaluation.batch_loss import batch_loss
from lora_engine.objectives import DPO, GRPO, SFT, Distill, Reward
from lora_engine.objectives.answers import mean_of, weight_of
from lora_engine.objectives.close_to_base import CloseToBase


def model_in_float64():
    """With adapters that are not fresh."""
    return tiny_lora(init_lora_weights=False, autocast_adapter_dtype=False).double()


def logits_at_targets(model, examples):
    rows, ids = [], []
    for example in examples:
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0, :-1]
        taught = torch.tensor(example.supervised[1:])
        rows.append(logits[taught])
        ids.append(torch.tensor(example.input_ids[1:])[taught])
    return torch.cat(rows), torch.cat(ids)


def formula(model, examples, coefficient):
    """Mean of −log p(target) + coefficient KL(q, p), every logit made."""
    logits, ids = logits_at_targets(model, examples)
    with torch.no_grad(), model.disable_adapter():
        base, _ = logits_at_targets(model, examples)
    log_p, log_q = logits.log_softmax(-1), base.log_softmax(-1)
    divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
    return (-log_p.gather(-1, ids[:, None])[:, 0] + coefficient * divergence).mean()


@pytest.mark.parametrize("coefficient", [0.1, 3.0])
def test_loss_and_gradients_are_the_formulas(coefficient):
    examples = make_examples(6)
    model, oracle = model_in_float64(), model_in_float64()
    objective, batch = CloseToBase(SFT(), coefficient), one_batch(examples)
    loss = batch_loss(model, batch, objective)
    total = mean_of(objective, loss, weight_of(objective, batch))
    total.backward()
    expected = formula(oracle, examples, coefficient)
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-10)
    wanted = {name: p.grad for name, p in oracle.named_parameters() if p.grad is not None}
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert actual.keys() == wanted.keys() and len(actual) >= 28
    for name, gradient in wanted.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-8, atol=1e-12, msg=name)


def test_without_an_adapters_effect_the_divergence_is_nothing():
    model = tiny_lora(autocast_adapter_dtype=False).double()
    loss = batch_loss(model, one_batch(make_examples(4)), CloseToBase(SFT(), 1.0))
    assert loss.total["kl_to_base"].item() == pytest.approx(0, abs=1e-12)


def test_each_term_has_its_own_weight():
    batch = one_batch(examples_for("dpo sigmoid"))
    weights = weight_of(CloseToBase(DPO(), 0.5), batch)
    assert weights == {"": DPO().weight(batch), "kl_to_base": batch.num_targets}
    model = tiny_lora(init_lora_weights=False)
    loss, own = (batch_loss(model, batch, o) for o in (CloseToBase(DPO(), 0.5), DPO()))
    assert loss.total[""].item() == pytest.approx(own.total.item(), rel=1e-6)
    mean = loss.metrics["kl_to_base"]
    assert loss.total["kl_to_base"].item() == pytest.approx(0.5 * mean.total.item(), rel=1e-6)
    assert set(loss.metrics) == {*own.metrics, "kl_to_base"}


@pytest.mark.parametrize(
    ("objective", "reason"),
    [
        (Distill(), "is drawn to a teacher already"),
        (Reward(), "predicts no tokens"),
        (GRPO(), "has such a term of its own, objective.kl_weight"),
    ],
    ids=["distill", "reward", "grpo"],
)
def test_objectives_that_take_no_such_term_are_named(objective, reason):
    with pytest.raises(UserError, match=f"kl_to_base: objective {objective.name} {reason}; leave"):
        CloseToBase(objective, 0.1)
