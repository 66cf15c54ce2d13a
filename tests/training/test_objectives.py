"""An objective unlike supervised fine-tuning goes through everything that SFT goes through.

It is defined here: pairs of examples, not tokens; a reference; entropy; metrics of its own.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import peft
import pytest
import torch
from training_helpers import (
    EVAL,
    TRAIN,
    SignalAtStep,
    accelerated,
    assert_same_bits,
    lines,
    make_examples,
    one_batch,
    tiny_llama,
    tiny_lora,
    trainable,
)

from lora_engine import TrainConfig, Trainer, UserError, preflight
from lora_engine.evaluation.heldout import evaluate
from lora_engine.evaluation.nonfinite import NonFiniteError, first_nonfinite_layer
from lora_engine.objectives.base import Loss, Mean, Reads
from lora_engine.objectives.sft import SFT
from lora_engine.training.optimizer.adamw import FlatAdamW
from lora_engine.training.optimizer.flat import FlatParameters
from lora_engine.training.step import TrainStep


@dataclass(frozen=True)
class PreferLarge:
    """DPO over a batch's pairs: the example whose targets have the larger mean id is chosen."""

    beta: float = 0.5
    name: ClassVar[str] = "prefer_large"
    unit: ClassVar[str] = "nats per pair"
    reads: ClassVar[Reads] = Reads(each_logprob=True, entropy=True, reference=True)

    def weight(self, batch):
        return len(self.pairs(batch)[0])

    def pairs(self, batch):
        parts = batch.target_ids.split(batch.target_counts)
        means = torch.stack([ids.double().mean() for ids in parts])
        return (means[:, None] > means[None]).nonzero(as_tuple=True)

    def __call__(self, scores, batch):
        log_ratios = (scores.logprobs - scores.reference).split(batch.target_counts)
        rewards = self.beta * torch.stack([part.sum() for part in log_ratios])
        chosen, rejected = self.pairs(batch)
        margins = rewards[chosen] - rewards[rejected]
        count = len(margins)
        metrics = {
            "rewards/margins": Mean(margins.sum(), count),
            "rewards/accuracies": Mean((margins > 0).sum(), count),
            "entropy": Mean(scores.entropy.sum(), batch.num_targets),
        }
        return Loss(-torch.nn.functional.logsigmoid(margins).sum(), metrics)


METRICS = {"rewards/margins", "rewards/accuracies", "entropy"}
MODELS = {"plain": lambda model: model, "accelerated": accelerated}


def make_trainer(folder, objective, model=None, **config):
    settings = {"max_steps": 6, "tokens_per_batch": 64, "learning_rate": 5e-3, **config}
    callbacks = settings.pop("callbacks", ())
    model = tiny_lora() if model is None else model
    config = TrainConfig(output_dir=folder, **settings)
    return Trainer(model, None, TRAIN, EVAL, config, objective=objective, callbacks=callbacks)


def make_step(model, objective, **config):
    model.train()
    flat = FlatParameters(model.named_parameters())
    return TrainStep(model, objective, FlatAdamW(flat, TrainConfig(**config)))


def sequence_logprobs(model, examples):
    """Σ log p over each example's targets, by transformers' own forward, one after the other."""
    sums = []
    for example in examples:
        ids = torch.tensor(example.input_ids)
        logits = model(input_ids=ids[None]).logits[0, :-1].double()
        logprobs = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        sums.append(logprobs[torch.tensor(example.supervised[1:])].sum())
    return torch.stack(sums)


@pytest.mark.parametrize("kind", list(MODELS))
def test_step_has_the_loss_and_gradient_of_the_formula(kind):
    examples, objective = make_examples(8), PreferLarge()
    model = tiny_lora(init_lora_weights=False)
    policy = sequence_logprobs(model, examples)
    with torch.no_grad(), model.disable_adapter():
        reference = sequence_logprobs(model, examples)
    batch = one_batch(examples)
    chosen, rejected = objective.pairs(batch)
    rewards = objective.beta * (policy - reference)
    margins = rewards[chosen] - rewards[rejected]
    expected = torch.nn.functional.softplus(-margins).mean()
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    step = make_step(MODELS[kind](tiny_lora(init_lora_weights=False)), objective)
    result = step(1, [batch], 1e-3, lambda: None)
    assert result.loss == pytest.approx(expected.item(), rel=1e-5)
    assert set(result.metrics) == METRICS
    assert result.metrics["rewards/margins"] == pytest.approx(margins.mean().item(), rel=1e-4)
    assert result.metrics["rewards/accuracies"] == (margins > 0).double().mean().item()
    flat = step.optimizer.flat
    assert gradients.keys() == {entry.name for entry in flat.entries}
    for entry in flat.entries:
        torch.testing.assert_close(
            entry.view(flat.grad), gradients[entry.name], rtol=1e-3, atol=1e-5 * result.grad_norm
        )


def test_micro_batches_share_one_weight():
    """Sums over all micro-batches over the weight of all, whatever the weight of each."""
    objective, parts = PreferLarge(), [make_examples(7), make_examples(3, seed=5)]
    batches = [one_batch(part) for part in parts]
    model = tiny_lora(init_lora_weights=False)
    apart = []
    for batch in batches:
        step = make_step(tiny_lora(init_lora_weights=False), objective)
        apart.append(step(1, [batch], 1e-3, lambda: None))
    weights = [objective.weight(batch) for batch in batches]
    assert weights[0] > weights[1] > 0
    alone = [one_batch(make_examples(1))]  # no pair: the model does not see it
    both = make_step(model, objective)(1, [*batches, *alone], 1e-3, lambda: None)

    def mean(values):
        return sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)

    assert both.loss == pytest.approx(mean([x.loss for x in apart]), rel=1e-6)
    name = "rewards/margins"
    assert both.metrics[name] == pytest.approx(mean([x.metrics[name] for x in apart]), rel=1e-4)


def test_a_step_without_any_weight_leaves_the_weights():
    step = make_step(tiny_lora(), PreferLarge(), weight_decay=0.5)
    before = trainable(step.model)
    result = step(1, [one_batch(make_examples(1))], 0.1, lambda: None)
    assert (result.loss, result.grad_norm, result.metrics) == (0.0, 0.0, {})
    assert_same_bits(trainable(step.model), before)


@pytest.mark.parametrize("kind", list(MODELS))
def test_it_is_trained_measured_and_written_down(tmp_path, kind):
    told = []

    class Watch:
        def on_eval(self, step, result):
            told.append(result)

    model = MODELS[kind](tiny_lora())
    config = {"max_steps": 12, "learning_rate": 2e-2, "tokens_per_batch": 200}
    result = make_trainer(tmp_path, PreferLarge(), model, callbacks=[Watch()], **config).fit()
    # The adapter is fresh: the model is its own reference.
    assert told[0].loss == pytest.approx(math.log(2), abs=1e-6)
    assert told[0].metrics["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert result.heldout_loss_before == told[0].loss
    assert result.heldout_loss_after < 0.5
    assert told[-1].metrics["rewards/accuracies"] > 0.65
    written = lines(tmp_path)
    steps = [line for line in written if "loss" in line]
    assert len(steps) == 12 and all(line.keys() > METRICS for line in steps)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    last = written[-1]
    for name, value in told[-1].metrics.items():
        assert last[f"heldout_{name}"] == value
    assert "held-out loss, nats per pair |" in (tmp_path / "adapter/README.md").read_text()


def test_evaluation_adds_up_over_batches_as_one_formula(tmp_path):
    model, objective = tiny_lora(init_lora_weights=False), PreferLarge()
    batches = [one_batch(make_examples(5)), one_batch(make_examples(4, seed=7))]
    parts = [evaluate(model, [batch], objective) for batch in batches]
    both = evaluate(model, [*batches, one_batch(make_examples(1))], objective)
    weights = [objective.weight(batch) for batch in batches]
    expected = sum(w * part.loss for w, part in zip(weights, parts, strict=True)) / sum(weights)
    assert both.loss == pytest.approx(expected, rel=1e-9)
    targets = [part.targets for part in parts]
    entropies = [part.metrics["entropy"] for part in parts]
    expected = sum(n * x for n, x in zip(targets, entropies, strict=True)) / sum(targets)
    assert both.metrics["entropy"] == pytest.approx(expected, rel=1e-9)
    with pytest.raises(UserError, match="prefer_large"):
        evaluate(model, [one_batch(make_examples(1))], objective)


def test_interrupted_and_resumed_has_the_same_bits(tmp_path):
    whole, broken = tiny_lora(dropout=0.2), tiny_lora(dropout=0.2)
    make_trainer(tmp_path / "whole", PreferLarge(), whole).fit()
    callbacks = [SignalAtStep(3)]
    make_trainer(tmp_path / "broken", PreferLarge(), broken, callbacks=callbacks).fit()
    resumed = tiny_lora(dropout=0.2)
    result = make_trainer(tmp_path / "broken", PreferLarge(), resumed).fit(resume=True)
    assert result.steps == 6
    assert_same_bits(trainable(resumed), trainable(whole))
    for name in METRICS:
        values = [[x.get(name) for x in lines(tmp_path / run)] for run in ("whole", "broken")]
        assert values[0] == values[1]


def test_a_run_is_not_resumed_with_another_objective(tmp_path):
    make_trainer(tmp_path, PreferLarge(), max_steps=1).fit()
    with pytest.raises(UserError, match=r"beta=0.5, now beta=0.1 \(objective\)"):
        make_trainer(tmp_path, PreferLarge(beta=0.1), max_steps=1).fit(resume=True)
    with pytest.raises(UserError, match=r"name=prefer_large, now name=sft \(objective\)"):
        make_trainer(tmp_path, SFT(), max_steps=1).fit(resume=True)


@dataclass(frozen=True)
class Weighted:
    """An objective whose settings JSON does not know."""

    of_tokens: torch.Tensor
    of_loss: object
    name: ClassVar[str] = "weighted"
    unit: ClassVar[str] = ""
    reads: ClassVar[Reads] = Reads(each_logprob=True)

    def weight(self, batch):
        return batch.num_targets

    def __call__(self, scores, batch):
        return Loss(-(self.of_loss(scores.logprobs) * self.of_tokens[batch.target_ids]).sum())


def test_settings_that_json_does_not_know_are_compared_by_value(tmp_path):
    """All elements of a long tensor count, and a function of another process is the same one."""
    weights, others = torch.ones(5000), torch.ones(5000)
    others[2500] = 2
    make_trainer(tmp_path, Weighted(weights, clamped), max_steps=1).fit()
    make_trainer(tmp_path, Weighted(weights.clone(), again(clamped)), max_steps=1).fit(resume=True)
    with pytest.raises(UserError, match=r"made with another of_tokens \(objective\)"):
        make_trainer(tmp_path, Weighted(others, clamped), max_steps=1).fit(resume=True)
    with pytest.raises(UserError, match=r"of_loss=\S+\.clamped, now of_loss=\S+\.again"):
        make_trainer(tmp_path, Weighted(weights, again), max_steps=1).fit(resume=True)


def clamped(logprobs):
    return logprobs.clamp(min=-20)


def again(function):
    """The same function at another address."""
    return type(function)(function.__code__, function.__globals__)


def test_a_layer_that_is_not_finite_is_named(tmp_path):
    model = tiny_lora()

    class Poison:
        def on_step(self, metrics):
            if metrics.step == 2:
                with torch.no_grad():
                    model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight[:] = (
                        torch.nan
                    )

    with pytest.raises(NonFiniteError) as caught:
        make_trainer(tmp_path, PreferLarge(), model, callbacks=[Poison()]).fit()
    assert (caught.value.step, caught.value.what) == (3, "the loss is nan")
    assert "layers.1.mlp" in caught.value.layer
    assert caught.value.checkpoint.name == "step-00000002"


@dataclass(frozen=True)
class Broken:
    """Finite log-probabilities, and what is not finite made of them."""

    part: str
    name: ClassVar[str] = "broken"
    unit: ClassVar[str] = ""
    reads: ClassVar[Reads] = Reads()

    def weight(self, batch):
        return 1

    def __call__(self, scores, batch):
        infinite = scores.total.detach() * math.inf
        if self.part == "loss":
            return Loss(-scores.total - infinite)
        return Loss(-scores.total, {"ratio": Mean(infinite, 1)})


def test_an_objective_that_is_not_finite_is_named():
    model, batch = tiny_lora(), one_batch(make_examples(3))
    assert first_nonfinite_layer(model, batch, Broken("loss")) == "objective broken"
    assert first_nonfinite_layer(model, batch, Broken("metric")) is None
    step = make_step(model, Broken("loss"))
    with pytest.raises(NonFiniteError, match=r"step 4: the loss is inf; first bad layer objective"):
        step(4, [batch], 0.1, lambda: None)


def test_a_metric_that_is_not_finite_stops_the_step_before_the_update():
    model, batch = tiny_lora(), one_batch(make_examples(3))
    step, before = make_step(model, Broken("metric")), trainable(model)
    with pytest.raises(NonFiniteError, match=r"step 1: ratio is -inf; samples data\.jsonl:1"):
        step(1, [batch], 0.1, lambda: None)
    assert_same_bits(trainable(model), before)
    with pytest.raises(NonFiniteError, match="the held-out ratio is -inf"):
        evaluate(model, [batch], Broken("metric"))


def test_preflight_tries_the_objective():
    model = tiny_lora(init_lora_weights=False)
    batch, objective = one_batch(make_examples(6)), PreferLarge()
    report = preflight(model, batch, objective=objective)
    assert report.loss_before == pytest.approx(evaluate(model, [batch], objective).loss, rel=1e-5)
    assert report.loss_after < report.loss_before
    with pytest.raises(UserError, match="prefer_large has nothing to learn from in the batch"):
        preflight(model, one_batch(make_examples(1)), objective=objective)
    with torch.no_grad():
        model.get_base_model().model.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match=r"the loss is nan; first bad layer .*norm"):
        preflight(model, batch, objective=objective)


def test_the_reference_leaves_what_is_trained_and_every_mode(tmp_path):
    """PEFT's own switch would make a frozen A trainable again."""
    model = tiny_lora(dropout=0.3, init_lora_weights=False)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    step = make_step(model, PreferLarge())
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    step(1, [one_batch(make_examples(4))], 1e-3, lambda: None)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert all(module.training for module in model.modules())
    assert not any(getattr(m, "disable_adapters", False) is True for m in model.modules())


def test_a_reference_needs_adapters(tmp_path):
    with pytest.raises(UserError, match="compares the model with itself without adapters"):
        make_trainer(tmp_path, PreferLarge(), tiny_llama()).fit()


def test_rows_of_several_adapters_have_one_reference():
    from dataclasses import replace

    def two_adapters(name, **config):
        model = tiny_lora(init_lora_weights=False)
        other = peft.LoraConfig(
            r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False
        )
        model.add_adapter("other", other)
        model.base_model.set_adapter(["default", "other"] if name is None else [name])
        return accelerated(model)

    examples = make_examples(6)
    names = ["default", "other"] * 3
    mixed = one_batch([replace(e, adapter=n) for e, n in zip(examples, names, strict=True)])
    together = evaluate(two_adapters(None), [mixed], SequenceRatio())
    expected = 0.0
    for name in ("default", "other"):
        part = [e for e, n in zip(examples, names, strict=True) if n == name]
        expected += evaluate(two_adapters(name), [one_batch(part)], SequenceRatio()).loss
    assert together.loss == pytest.approx(expected, rel=1e-4)


@dataclass(frozen=True)
class SequenceRatio:
    """Σ (log p − log p_reference)² over all targets."""

    name: ClassVar[str] = "ratio"
    unit: ClassVar[str] = ""
    reads: ClassVar[Reads] = Reads(each_logprob=True, reference=True)

    def weight(self, batch):
        return 1

    def __call__(self, scores, batch):
        return Loss((scores.logprobs - scores.reference).square().sum())
