"""Runs of several processes: the same numbers, files and ends as of one."""

import shutil
import signal
import time

import numpy as np
import pytest
from processes import Together, run_together
from shared_fits import (
    fit,
    fit_and_die,
    fit_each,
    fit_on_other_data,
    fit_sharded,
    fit_with_a_bad_batch,
)
from training_helpers import lines, saved_steps

from lora_engine.distributed.world import PeerLost
from lora_engine.errors import UserError
from lora_engine.evaluation.nonfinite import NonFiniteError
from lora_engine.training.run.checkpoint import CheckpointStore

QUICK = {"sft": ("sft", {"dropout": 0.3}), "dpo": ("dpo sigmoid", {})}
RUNS = {**QUICK, "kto": ("kto", {}), "adamw_8bit": ("sft", {"optimizer": "adamw_8bit"})}
# Of float32 sums in another order, after 20 steps.
ROUNDING = {"rel": 2e-4, "abs": 2e-5}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of the runs."""
    folder = tmp_path_factory.mktemp("alone")
    (runs,) = run_together(1, fit_each, folder, QUICK)
    return folder, runs


def assert_same_run(run, expected, *, quantised=False):
    (result, steps, evals, weights), (of_one, *of_one_rest) = run, expected
    assert [s.loss for s in steps] == pytest.approx([s.loss for s in of_one_rest[0]], **ROUNDING)
    for step, own in zip(steps, of_one_rest[0], strict=True):
        assert step.grad_norm == pytest.approx(own.grad_norm, rel=5e-3)
        assert (step.tokens, step.supervised_tokens) == (own.tokens, own.supervised_tokens)
        assert step.metrics == pytest.approx(own.metrics, rel=2e-3, abs=2e-4)
    for (step, measured), (own_step, own) in zip(evals, of_one_rest[1], strict=True):
        assert step == own_step
        assert measured.loss == pytest.approx(own.loss, **ROUNDING)
        assert measured.accuracy == pytest.approx(own.accuracy)
        assert (measured.tokens, measured.targets) == (own.tokens, own.targets)
    assert (result.stopped, result.best_step) == (of_one.stopped, of_one.best_step)
    for name, values in weights.items():
        # A code of 8-bit moments may be the next one; losses and norms above stay as close.
        off = 2e-3 if quantised else 2e-4
        np.testing.assert_allclose(values, of_one_rest[2][name], rtol=2e-3, atol=off)


def test_two_processes_train_as_one(alone, tmp_path):
    folder, expected = alone
    first, second = run_together(2, fit_each, tmp_path, QUICK)
    for key in QUICK:
        assert_same_run(first[key], expected[key])
        # The others hold the same weights to the bit, and tell nobody.
        for name, values in second[key][3].items():
            assert np.array_equal(values, first[key][3][name]), name
        assert second[key][1:3] == ([], [])
    for key in QUICK:
        own, of_one = tmp_path / key, folder / key
        assert sorted(p.relative_to(own) for p in own.rglob("*")) == sorted(
            p.relative_to(of_one) for p in of_one.rglob("*")
        )
        assert [line["step"] for line in lines(own)] == [line["step"] for line in lines(of_one)]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_every_kind_of_run_on_more_processes(tmp_path, count):
    (expected,) = run_together(1, fit_each, tmp_path / "alone", RUNS)
    first, *_ = run_together(count, fit_each, tmp_path / "together", RUNS)
    for key in RUNS:
        assert_same_run(first[key], expected[key], quantised=key == "adamw_8bit")


@pytest.mark.parametrize(
    "count",
    [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)],
)
def test_an_interrupted_run_goes_on_with_any_number(alone, tmp_path, count):
    """The signal comes to the first process alone, and all stop at the same step."""
    result, steps, evals, weights = alone[1]["sft"]
    for interrupted, *_ in run_together(2, fit_until, tmp_path, 7):
        assert (interrupted.stopped, interrupted.steps) == ("interrupted", 7)
    continued, *others = run_together(count, fit_on, tmp_path)
    expected = result, steps[7:], evals[1:], weights
    assert_same_run(continued, expected)
    for other in others:
        for name, values in other[3].items():
            assert np.array_equal(values, continued[3][name]), name


@pytest.mark.parametrize(
    ("rank", "counts"),
    [
        (1, [1]),
        pytest.param(1, [2, 4], marks=pytest.mark.slow),
        pytest.param(0, [1, 2], marks=pytest.mark.slow),
    ],
)
def test_a_killed_process_ends_the_others(alone, tmp_path, rank, counts):
    """counts: of processes that go on, each from the same checkpoint."""
    killed = tmp_path / "killed"
    run = Together(2, fit_and_die, killed, rank, 5)
    assert run.result(rank) is None
    run.processes[rank].join(60)
    assert run.processes[rank].exitcode == -signal.SIGKILL
    died = time.monotonic()
    # Only the launcher is left to tell that the first process is gone, with its store.
    assert isinstance(run.result(1 - rank), PeerLost if rank == 1 else SystemExit)
    assert time.monotonic() - died < 30
    # The first process saves its last step if it lives.
    last = 5 if rank == 1 else 4
    assert saved_steps(killed)[-1] == last
    store = CheckpointStore(killed / "checkpoints")
    assert all(store.problem(step) is None for step in saved_steps(killed))
    result, steps, evals, weights = alone[1]["sft"]
    for count in counts:
        folder = tmp_path / str(count)
        shutil.copytree(killed, folder)
        continued, *_ = run_together(count, fit_on, folder)
        assert_same_run(continued, (result, steps[last:], evals[1:], weights))


def test_what_one_process_finds_bad_all_tell_alike(tmp_path):
    run = Together(2, fit_with_a_bad_batch, tmp_path)
    first, second = run.result(0), run.result(1)
    assert isinstance(first, NonFiniteError) and isinstance(second, SystemExit)
    assert first.layer is not None and first.layer.startswith("base_model.model.model.norm")
    assert first.checkpoint is not None and first.checkpoint.is_dir()


def test_processes_with_other_data_do_not_train(tmp_path):
    run = Together(2, fit_on_other_data, tmp_path)
    first = run.result(0)
    assert isinstance(first, UserError)
    assert str(first).startswith("process 1 has other data than process 0")


def test_fewer_micro_batches_than_processes_are_refused(tmp_path):
    run = Together(2, fit_in_one_batch, tmp_path)
    first = run.result(0)
    assert isinstance(first, UserError)
    assert "set train.gradient_accumulation_steps to 2" in str(first)


LINEARS = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)  # values of the tiny model's linears


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_share_the_weights_train_as_one(tmp_path, count):
    """Five micro-batches, which no number of processes divides, dense and in packed bits."""
    formats = [None, "nf4"]
    (expected,) = run_together(1, fit_sharded, tmp_path / "alone", formats)
    first, *others = run_together(count, fit_sharded, tmp_path / "together", formats)
    for format, width in ((None, 4), ("nf4", 0.5 + 4 / 64)):
        assert_same_run(first[format][0], expected[format][0])
        assert first[format][1] == pytest.approx(LINEARS * width / count, rel=0.02)
        for other in others:
            for name, values in other[format][0][3].items():
                assert np.array_equal(values, first[format][0][3][name]), name


def fit_until(folder, step):
    return fit(folder, dropout=0.3, stop_at=step)


def fit_on(folder):
    return fit(folder, dropout=0.3, resume=True)


def fit_in_one_batch(folder):
    return fit(folder, gradient_accumulation_steps=1)
