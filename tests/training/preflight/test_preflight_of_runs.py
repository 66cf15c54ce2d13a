"""The try that a run begins with."""

from dataclasses import replace

import pytest
from training_helpers import (
    accelerated,
    assert_same_bits,
    layer,
    lines,
    make_examples,
    make_trainer,
    tiny_lora,
    trainable,
)

from lora_engine import UserError, preflight
from lora_engine.data.dataset import TokenizedDataset


def fitted(folder, model, **config):
    make_trainer(folder, model, **config).fit()
    measured = [{k: v for k, v in x.items() if k != "tokens_per_second"} for x in lines(folder)]
    for line in measured:
        line.pop("peak_memory_bytes", None)
    return measured, trainable(model)


def test_a_run_is_the_same_with_and_without(tmp_path):
    results = []
    for number, wanted in enumerate((True, False)):
        model = tiny_lora(dropout=0.2)
        folder = tmp_path / str(number)
        results.append(fitted(folder, accelerated(model), preflight=wanted))
    (measured, weights), (measured_without, weights_without) = results
    assert measured == measured_without
    assert_same_bits(weights, weights_without)


def test_a_run_that_fails_leaves_the_one_before(tmp_path):
    make_trainer(tmp_path).fit()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    model = tiny_lora()
    layer(model).mlp.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(UserError, match="gets no gradient"):
        make_trainer(tmp_path, model, overwrite=True).fit()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_it_runs_before_each_sitting_with_steps_left(tmp_path, monkeypatch):
    tried = []

    def noted(model, batch, **options):
        tried.append(batch)
        return preflight(model, batch, **options)

    monkeypatch.setattr("lora_engine.training.trainer.preflight", noted)
    make_trainer(tmp_path, max_steps=2).fit()
    make_trainer(tmp_path, max_steps=4, schedule="cosine").fit(resume=True)
    make_trainer(tmp_path, max_steps=4).fit(resume=True)  # all is done
    make_trainer(tmp_path, max_steps=6, preflight=False).fit(resume=True)
    assert len(tried) == 2
    assert [batch.origins for batch in tried] == [tried[0].origins] * 2


def test_a_run_that_goes_on_tries_the_weights_of_its_checkpoint(tmp_path, monkeypatch):
    seen = []

    def noted(model, batch, **options):
        seen.append((trainable(model), preflight(model, batch, **options)))

    first = make_trainer(tmp_path, max_steps=4)
    first.fit()
    reached = trainable(first.model)
    monkeypatch.setattr("lora_engine.training.trainer.preflight", noted)
    model = tiny_lora()
    before = trainable(model)
    trainer = make_trainer(tmp_path, model, max_steps=6)
    trainer.preflight(trainer.check_folder(resume=True))
    [(tried, report)] = seen
    assert_same_bits(tried, reached)
    assert report.loss_before < 0.98 * preflight(model, trainer._train_source.first(64)).loss_before
    assert_same_bits(trainable(model), before)


def test_batches_without_targets_are_passed_over(tmp_path):
    idle = [replace(e, supervised=[False] * len(e)) for e in make_examples(30)]
    data = TokenizedDataset([*idle, *make_examples(2)])
    make_trainer(tmp_path / "some", train=data, tokens_per_batch=14, max_steps=1).fit()
    trainer = make_trainer(tmp_path / "none", train=TokenizedDataset(idle), max_steps=1)
    with pytest.raises(UserError, match="no token of the batch is supervised"):
        trainer.fit()
