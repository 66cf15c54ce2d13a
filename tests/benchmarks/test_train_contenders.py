import math
from dataclasses import replace

import pytest
import torch

from benchmarks.common import jobs
from benchmarks.train import loss_parity, train_contenders, train_job, train_workload


@pytest.fixture(scope="module")
def workload(chat_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("workload")
    train_workload.prepare(folder, batches=2, batch_size=2, seed=0, model_source=str(chat_model))
    return train_workload.load(folder)


@pytest.mark.slow
def test_workload_is_the_same_for_everyone(workload, chat_model, tmp_path):
    train_workload.prepare(tmp_path, batches=2, batch_size=2, seed=0, model_source=str(chat_model))
    again = train_workload.load(tmp_path)
    assert again.batches == workload.batches
    assert again.adapters.read_bytes() == workload.adapters.read_bytes()
    assert [len(batch) for batch in workload.batches] == [2, 2]
    for targets, lengths in zip(workload.targets(), workload.lengths(), strict=True):
        assert 0 < targets < sum(lengths)


def test_initial_adapters_are_loaded_and_not_zero(workload):
    first, _ = train_workload.load_with_adapters(workload, torch.float32)
    second, _ = train_workload.load_with_adapters(workload, torch.float32)
    trained = {n: p for n, p in first.named_parameters() if p.requires_grad}
    assert any("lora_B" in name for name in trained)
    for name, parameter in trained.items():
        assert torch.equal(parameter, second.get_parameter(name))
        assert parameter.abs().max() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ours_takes_a_step_per_batch(workload, dtype):
    result = train_contenders.run(workload, "ours", getattr(torch, dtype), "auto")
    assert len(result.steps) == 2
    assert all(math.isfinite(step.loss) and step.seconds > 0 for step in result.steps)
    assert 0 < result.loaded_bytes <= result.peak_bytes
    assert result.peak_training_bytes <= result.peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize("contender", ["trl-default", "trl-padded", "trl-padding-free"])
def test_trl_does_the_same_job(workload, contender):
    ours = train_contenders.run(workload, "ours", torch.float32, "auto")
    theirs = train_contenders.run(workload, contender, torch.float32, "auto")
    losses = [(mine.loss, other.loss) for mine, other in zip(ours.steps, theirs.steps, strict=True)]
    for mine, other in losses:
        assert mine == pytest.approx(other, rel=1e-5)


def test_matmul_rate(workload):
    measured = train_contenders.measure_matmuls(workload, torch.float32)
    assert measured["seconds"] > 0 and measured["flops_per_second"] > 0


def test_checkpointing_option_overrides_a_variant(workload, monkeypatch):
    seen = []
    monkeypatch.setattr(train_contenders, "run_trl", lambda *args: seen.append(args[-1]))
    for choice in ("auto", "on", "off"):
        train_contenders.run(workload, "trl-default", torch.float32, choice)
    default = train_contenders.TRL_VARIANTS["trl-default"]
    assert seen == [default, default, replace(default, gradient_checkpointing=False)]


@pytest.mark.slow
def test_the_first_loss_is_that_of_plain_peft(chat_model, tmp_path):
    words = {"model": str(chat_model), "dtype": "float32", "steps": "1", "batch_size": "2"}
    options, names = jobs.options_of(train_job.JOB, words)
    facts = train_job.prepare(tmp_path, options)
    assert names == ("ours", "trl-padded", "trl-padding-free")
    assert [len(facts[kind][""]) for kind in ("amounts", "flops")] == [2, 2]
    for name in ("ours", "peft"):
        result = train_job.run(tmp_path, options, name)
        assert result.steps[0].loss == pytest.approx(facts["expected"][""], rel=1e-5)
        assert result.contender == name and len(result.steps) == 2 and result.calls > 50


def test_the_second_loss_is_that_of_a_plain_training(chat_model, tmp_path, monkeypatch):
    """In parts it is the same step."""
    monkeypatch.setattr(train_job, "AT_ONCE", 2)
    model = train_workload.prepare(
        tmp_path, batches=2, batch_size=3, seed=0, model_source=str(chat_model)
    )
    workload = train_workload.load(tmp_path)
    plain, _ = train_workload.load_with_adapters(workload, torch.float32)
    first, expected = loss_parity.train_plainly(plain, workload.batches, max_grad_norm=1.0)
    mine, (before, after) = train_job.reference_losses(
        model, lambda number: train_job.plain_losses(model, workload.batches[number])
    )
    assert mine == pytest.approx(first, rel=1e-6) and after == pytest.approx(expected, rel=1e-6)
    assert before - after > 1e-4 * before and first != before
