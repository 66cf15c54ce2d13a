"""Continuing a run, and runs that end early: interrupted, failed, or of another configuration."""

import errno
import shutil
import signal

import pytest
import torch
from training_helpers import (
    TRAIN,
    SignalAtStep,
    accelerated,
    assert_same_bits,
    lines,
    make_dataset,
    make_trainer,
    saved_steps,
    tiny_llama,
    tiny_lora,
    trainable,
)

from lora_engine.errors import UserError
from lora_engine.evaluation.nonfinite import NonFiniteError
from lora_engine.training import random_state, together
from lora_engine.training.run.checkpoint import CheckpointStore


@pytest.mark.parametrize(
    ("make_model", "stop_at", "settings"),
    [
        pytest.param(lambda: tiny_lora(), 1, {}, id="float32"),
        pytest.param(lambda: tiny_lora(), 3, {"optimizer": "adamw_8bit"}, id="8-bit moments"),
        pytest.param(lambda: tiny_lora(0.3), 4, {}, id="dropout"),
        pytest.param(
            lambda: tiny_lora(0.3, torch.bfloat16, autocast_adapter_dtype=False),
            3,
            {},
            id="bfloat16 with dropout",
        ),
        pytest.param(lambda: accelerated(tiny_lora()), 4, {}, id="accelerated"),
        pytest.param(
            lambda: accelerated(tiny_lora(0.0, torch.bfloat16)), 3, {}, id="accelerated bfloat16"
        ),
    ],
)
def test_interrupted_and_resumed_is_bitwise_the_same(tmp_path, make_model, stop_at, settings):
    def fit(name, callbacks=(), resume=False):
        model = make_model()
        trainer = make_trainer(
            tmp_path / name,
            model,
            callbacks=callbacks,
            gradient_accumulation_steps=2,
            eval_every=2,
            final_weights="last",
            **settings,
        )
        return trainer.fit(resume=resume), model

    _, expected = fit("straight")
    interrupted, _ = fit("broken", [SignalAtStep(stop_at)])
    assert (interrupted.stopped, interrupted.steps) == ("interrupted", stop_at)
    assert interrupted.checkpoint_dir.is_dir()
    resumed, model = fit("broken", resume=True)
    assert resumed.stopped == "finished"
    assert_same_bits(trainable(model), trainable(expected))
    assert [x["step"] for x in lines(tmp_path / "broken")] == [
        x["step"] for x in lines(tmp_path / "straight")
    ]


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    first_model, second_model = tiny_lora(), tiny_lora()
    first = make_trainer(tmp_path, first_model).fit()
    before = lines(tmp_path)
    second = make_trainer(tmp_path, second_model).fit(resume=True)
    assert_same_bits(trainable(second_model), trainable(first_model))
    assert lines(tmp_path) == before
    assert (second.steps, second.train_tokens) == (first.steps, first.train_tokens)
    assert second.heldout_loss_before == first.heldout_loss_before
    assert second.heldout_loss_after == first.heldout_loss_after


def test_resume_with_nothing_there_starts_from_the_beginning_and_says_so(tmp_path, caplog):
    assert make_trainer(tmp_path / "a").fit(resume=True).steps == 6
    assert len(lines(tmp_path / "a")) == 8
    assert f"{tmp_path}/a: the run to resume is not there; starting from the" in caplog.text


def test_a_run_that_ended_before_its_first_checkpoint_begins_again(tmp_path, caplog, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(together, "measure", lambda *args, **kwargs: 1 / 0)
        make_trainer(tmp_path).fit()
    assert saved_steps(tmp_path) == []
    assert make_trainer(tmp_path).fit(resume=True).steps == 6
    assert "the run to resume ended before its first checkpoint; starting" in caplog.text


@pytest.mark.parametrize("name", ["weights", "exp_avg", "exp_avg_sq", "random", "state"])
def test_a_flipped_bit_costs_steps_and_nothing_else(tmp_path, name, caplog):
    expected, resumed = tiny_lora(0.2), tiny_lora(0.2)
    make_trainer(tmp_path / "straight", expected, save_every=2, final_weights="last").fit()
    shutil.copytree(tmp_path / "straight", tmp_path / "damaged")
    [path] = (tmp_path / "damaged" / "checkpoints" / "step-00000006").glob(f"{name}.*")
    flip(path)
    make_trainer(tmp_path / "damaged", resumed, save_every=2, final_weights="last").fit(resume=True)
    assert_same_bits(trainable(resumed), trainable(expected))
    assert [x["step"] for x in lines(tmp_path / "damaged")] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert str(path) in caplog.text and "continuing from step" in caplog.text


def flip(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def test_damaged_best_weights_are_not_taken(tmp_path, caplog):
    config = {"learning_rate": 0.1, "schedule": "constant", "max_grad_norm": None, "eval_every": 1}
    best = make_trainer(tmp_path, max_steps=9, **config).fit().best_step
    assert best < 9, "the test needs a run that gets worse again"
    path = tmp_path / "checkpoints" / f"step-{best:08d}" / "weights.safetensors"
    flip(path)
    model, last = tiny_lora(), tiny_lora()
    result = make_trainer(tmp_path, model, max_steps=9, **config).fit(resume=True)
    assert f"{path}: is damaged, its checksum is not the one saved with it: it was" in caplog.text
    make_trainer(tmp_path / "b", last, max_steps=9, **config, final_weights="last").fit()
    assert_same_bits(trainable(model), trainable(last))
    assert (
        result.heldout_loss_after
        == [x for x in lines(tmp_path) if "heldout_loss" in x][-1]["heldout_loss"]
    )


def test_without_a_sound_checkpoint_nothing_is_begun(tmp_path):
    make_trainer(tmp_path).fit()
    for path in tmp_path.glob("checkpoints/*/exp_avg.safetensors"):
        flip(path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"exp_avg.safetensors: is damaged.*begin the run again"):
        make_trainer(tmp_path).fit(resume=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({"max_steps": 4, "schedule": "constant", "warmup_steps": 2}, {"max_steps": 9}),
        ({"max_steps": None, "epochs": 1, "schedule": "constant"}, {"epochs": 2}),
    ],
    ids=["steps", "epochs"],
)
def test_an_extended_run_is_the_longer_run(tmp_path, caplog, short, long):
    config = {"gradient_accumulation_steps": 1, "final_weights": "last", **short}
    extended, expected = tiny_lora(0.2), tiny_lora(0.2)
    before = make_trainer(tmp_path / "a", tiny_lora(0.2), **config).fit().steps
    result = make_trainer(tmp_path / "a", extended, **{**config, **long}).fit(resume=True)
    whole = make_trainer(tmp_path / "b", expected, **{**config, **long}).fit()
    assert result.steps == whole.steps > before
    assert_same_bits(trainable(extended), trainable(expected))
    steps = [[x for x in lines(tmp_path / run) if "loss" in x] for run in ("a", "b")]
    assert [x["loss"] for x in steps[0]] == [x["loss"] for x in steps[1]]
    assert caplog.messages == [
        f"the run of {before} steps is extended to {whole.steps}, to the same weights as in one go"
    ]
    make_trainer(tmp_path / "a", tiny_lora(0.2), **{**config, **long}).fit(resume=True)
    assert len(caplog.messages) == 1


def test_what_extending_means_for_a_decaying_rate_is_told(tmp_path, caplog):
    make_trainer(tmp_path, max_steps=4).fit()
    longer = make_trainer(tmp_path, max_steps=8)
    longer.fit(resume=True)
    rates = [x["learning_rate"] for x in lines(tmp_path) if "loss" in x]
    assert rates == [make_trainer(tmp_path, max_steps=4).schedule(i) for i in range(1, 5)] + [
        longer.schedule(i) for i in range(5, 9)
    ]
    assert caplog.messages == [
        "the run of 4 steps is extended to 8; up to step 4 the learning rate followed the cosine "
        f"schedule of 4 steps (now at {rates[3]:.3g}), from here on it follows that of 8 "
        f"(next {rates[4]:.3g})"
    ]


def test_what_extending_an_incomplete_last_step_means_is_told(tmp_path, caplog):
    config = {"max_steps": None, "schedule": "constant", "gradient_accumulation_steps": 4}
    make_trainer(tmp_path, epochs=1, **config).fit()
    result = make_trainer(tmp_path, epochs=2, **config).fit(resume=True)
    assert result.stopped == "finished"
    assert "the last of its epoch, had fewer micro-batches than 4" in caplog.text


def test_what_a_callback_raises_ends_the_run_after_saving(tmp_path):
    class Fail:
        def on_step(self, metrics):
            if metrics.step == 3:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make_trainer(tmp_path, callbacks=[Fail()]).fit()
    assert saved_steps(tmp_path)[-1] == 3
    model, expected = tiny_lora(), tiny_lora()
    make_trainer(tmp_path, model).fit(resume=True)
    make_trainer(tmp_path / "straight", expected).fit()
    assert_same_bits(trainable(model), trainable(expected))


def test_a_terminal_that_hangs_up_interrupts(tmp_path):
    """Writing to it fails, too; the signal is the reason to end."""

    class HangUp:
        def on_step(self, metrics):
            if metrics.step == 2:
                signal.raise_signal(signal.SIGHUP)
                raise OSError(errno.EIO, "Input/output error")

    result = make_trainer(tmp_path, callbacks=[HangUp()]).fit()
    assert (result.stopped, result.steps) == ("interrupted", 2)
    assert saved_steps(tmp_path)[-1] == 2


def test_half_written_checkpoint_is_ignored(tmp_path):
    expected, model = tiny_lora(), tiny_lora()
    make_trainer(tmp_path / "straight", expected, save_every=2).fit()
    make_trainer(tmp_path / "broken", model, save_every=2).fit()
    folder = tmp_path / "broken" / "checkpoints" / "step-00000006"
    (folder / "exp_avg.safetensors").write_bytes(b"half")
    resumed = tiny_lora()
    make_trainer(tmp_path / "broken", resumed, save_every=2).fit(resume=True)
    assert_same_bits(trainable(resumed), trainable(expected))
    assert [x["step"] for x in lines(tmp_path / "broken")] == [0, 1, 2, 3, 4, 5, 6, 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.1}, "made with learning_rate=0.005, now learning_rate=0.1"),
        ({"optimizer": "adamw_8bit"}, "made with optimizer=adamw, now optimizer=adamw_8bit"),
        ({"max_steps": 3}, "made with max_steps=6, now max_steps=3: .* longer, not shorter"),
        ({"train": make_dataset(31)}, "made with other training data"),
        ({"model": tiny_lora(rank=3)}, r"made with r=4, now r=3 \(adapter default\)"),
        ({"model": tiny_llama()}, "made with adapter default, now without;"),
        ({"held_out": make_dataset(9, seed=1)}, "made with other held-out data"),
    ],
    ids=["learning rate", "optimizer", "steps", "data", "rank", "full model", "held out"],
)
def test_checkpoint_of_another_run_is_refused(tmp_path, change, message):
    make_trainer(tmp_path).fit()
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=message):
        make_trainer(tmp_path, **change).fit(resume=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files


def test_a_run_is_not_overwritten_unasked(tmp_path):
    make_trainer(tmp_path).fit()
    with pytest.raises(UserError, match="already holds a run: resume it, choose another"):
        make_trainer(tmp_path).fit()
    (tmp_path / "notes.txt").write_text("mine")
    result = make_trainer(tmp_path, max_steps=3, overwrite=True).fit()
    assert result.steps == 3
    assert len(lines(tmp_path)) == 5
    assert saved_steps(tmp_path)[-1] == 3
    assert (tmp_path / "notes.txt").exists()


def test_adapter_without_checkpoints_is_not_lost_by_resuming(tmp_path):
    make_trainer(tmp_path).fit()
    CheckpointStore(tmp_path / "checkpoints").clear()
    with pytest.raises(UserError, match="already holds a run, but no checkpoint: choose"):
        make_trainer(tmp_path).fit(resume=True)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_interruption_during_evaluation_is_evaluated_on_resumption(tmp_path, monkeypatch):
    from lora_engine.evaluation import heldout

    compute, calls = heldout.target_scores, []

    def interrupting(*given):
        calls.append(1)
        if len(calls) == 3:  # the evaluation at step 0 is one call of two batches
            signal.raise_signal(signal.SIGTERM)
        return compute(*given)

    monkeypatch.setattr(heldout, "target_scores", interrupting)
    config = {"held_out": make_dataset(12, seed=1), "eval_every": 3}
    first = make_trainer(tmp_path, **config).fit()
    assert (first.stopped, first.steps) == ("interrupted", 3)
    assert [x["step"] for x in lines(tmp_path)] == [0, 1, 2, 3]
    make_trainer(tmp_path, **config).fit(resume=True)
    assert [x["step"] for x in lines(tmp_path)] == [0, 1, 2, 3, 3, 4, 5, 6, 6]


def test_handlers_are_restored(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    make_trainer(tmp_path, max_steps=2, callbacks=[SignalAtStep(1)]).fit()
    assert signal.getsignal(signal.SIGTERM) is before


def test_non_finite_loss_keeps_the_last_good_state(tmp_path):
    model = tiny_lora()

    class Poison:
        def on_step(self, metrics):
            if metrics.step == 3:
                with torch.no_grad():
                    model.get_base_model().model.layers[0].self_attn.v_proj.weight[:] = torch.nan

    with pytest.raises(NonFiniteError) as caught:
        make_trainer(tmp_path, model, callbacks=[Poison()]).fit()
    error = caught.value
    assert isinstance(error, UserError)
    assert error.step == 4
    assert "layers.0.self_attn.v_proj" in error.layer
    assert set(error.origins) <= {e.origin for e in TRAIN}
    assert error.checkpoint == tmp_path / "checkpoints" / "step-00000003"
    assert saved_steps(tmp_path)[-1] == 3
    assert not (tmp_path / "adapter").exists()
    for parameter in trainable(model).values():
        assert torch.isfinite(parameter).all()
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4
    healthy = tiny_lora()
    assert make_trainer(tmp_path, healthy).fit(resume=True).stopped == "finished"
    expected = tiny_lora()
    make_trainer(tmp_path / "straight", expected).fit()
    assert_same_bits(trainable(healthy), trainable(expected))


def test_random_state_ends_where_an_uninterrupted_run_leaves_it(tmp_path):
    make_trainer(tmp_path / "a", tiny_lora(dropout=0.3)).fit()
    expected = random_state.capture()
    make_trainer(tmp_path / "b", tiny_lora(dropout=0.3), callbacks=[SignalAtStep(3)]).fit()
    make_trainer(tmp_path / "b", tiny_lora(dropout=0.3)).fit(resume=True)
    actual = random_state.capture()
    assert_same_bits(actual[0], expected[0])
    assert actual[1] == expected[1]
