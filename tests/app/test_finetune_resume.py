"""How a run goes on after a break, and what it refuses to go on with."""

import errno
import json
import os
import shutil

import pytest
import torch
from finetune_runs import (
    Recorder,
    everything_in,
    interrupt,
    read_metrics,
    run,
)
from safetensors.torch import load_file, save_file

from lora_engine.app.config import load_config
from lora_engine.app.finetune import finetune, how_to_resume
from lora_engine.errors import UserError


def test_interrupted_and_resumed_is_the_same_run(settings):
    whole = run("train.output_dir=whole")
    stopped = run(observer=Recorder(at_step=2, action=interrupt))
    assert stopped.result.stopped == "interrupted"
    assert stopped.summary is None
    assert not (settings / "out/summary.json").exists()
    assert how_to_resume(stopped.folder) == (
        "continue with: lora-engine train out/config.yaml --resume"
    )
    observer = Recorder()
    resumed = finetune(load_config("out/config.yaml"), resume=True, observer=observer)
    assert observer.steps == [3, 4]
    assert not any("before training" in stage for stage in observer.stages)
    for key in ("samples", "heldout_loss_before", "heldout_loss_after", "train_tokens"):
        assert resumed.summary[key] == whole.summary[key], key
    peaks = [row["peak_memory_bytes"] for row in read_metrics(settings / "out")]
    assert resumed.summary["peak_memory_bytes"] >= max(peaks)
    losses = [[row["loss"] for row in read_metrics(settings / name)] for name in ("whole", "out")]
    assert losses[0] == losses[1]
    ended = Recorder()
    assert finetune(load_config("out/config.yaml"), resume=True, observer=ended).summary
    assert (
        ended.steps == [] and "all 4 steps are done; the results are written again" in ended.stages
    )
    assert not any("measuring" in stage for stage in [*observer.stages, *ended.stages])


OTHER_RUNS = {
    "lora.alpha=512": r"lora_alpha=8.0, now lora_alpha=512.0 \(adapter default\)",
    "lora.seed=7": r"lora.seed=0, now lora.seed=7 \(model\)",
    "model.dtype=bfloat16": r"dtype=float32, now dtype=bfloat16, float32 \(model\)",
    "model.path=other": r"made with other model weights \(.*tiny, now other\)",
    "model.path=renamed": "made with another chat template; another vocabulary of the tokenizer;",
    "data.eval_fraction=0.3": "made with other held-out data; other training data",
}


def test_resuming_as_another_run_is_refused_and_touches_nothing(settings, saved_model):
    other, renamed = settings / "other", settings / "renamed"
    shutil.copytree(saved_model, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] += 1e-3
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    shutil.copytree(saved_model, renamed)
    for path in (renamed / "tokenizer.json", renamed / "tokenizer_config.json"):
        path.write_text(path.read_text().replace("<system>", "<tool>"))
    template = renamed / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    run("samples.count=0", "train.max_steps=1")
    before = everything_in(settings / "out")
    for change, message in OTHER_RUNS.items():
        with pytest.raises(UserError, match=message):
            run(change, "train.max_steps=1", resume=True)
    assert everything_in(settings / "out") == before


def test_there_has_to_be_a_run_to_resume(settings):
    with pytest.raises(UserError, match="out: holds no run to resume; begin one without --resume"):
        run(resume=True)
    assert not (settings / "out").exists()


def test_a_finished_run_is_extended(settings):
    whole = run("train.output_dir=whole", "train.max_steps=6", "train.schedule=constant")
    run("train.schedule=constant", "train.final_weights=last")
    extended = run("train.max_steps=6", "train.schedule=constant", resume=True)
    for key in ("samples", "heldout_loss_before", "heldout_loss_after", "train_tokens", "steps"):
        assert extended.summary[key] == whole.summary[key], key
    assert load_config("out/config.yaml").train.max_steps == 6


@pytest.mark.parametrize(
    "content", ["{", '{"asked": 1}', "[" * 100_000], ids=["cut", "other", "deep"]
)
def test_damaged_files_of_a_run_are_made_again(settings, content):
    whole = run("train.max_steps=1").summary
    for name in ("samples_before.json", "summary.json", "metrics.jsonl"):
        (settings / "out" / name).write_text(content)
    summary = run("train.max_steps=1", resume=True).summary
    assert summary["samples"] == whole["samples"]
    assert json.loads((settings / "out/summary.json").read_text()) == summary
    assert json.loads((settings / "out/samples_before.json").read_text())["texts"]


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_at_the_end_keeps_what_was_learned(settings, monkeypatch):
    whole = run("train.output_dir=whole").summary
    for target in (
        "lora_engine.training.trainer.export_model",
        "lora_engine.app.finetune.write_report",
    ):
        with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
            patched.setattr(target, full_disk)
            run(resume=(settings / "out").exists())
        assert how_to_resume(settings / "out").startswith("continue with: lora-engine train")
    summary = run(resume=True).summary
    for key in ("samples", "heldout_loss_after", "train_tokens"):
        assert summary[key] == whole[key], key


def test_changed_prompts_are_sampled_anew_on_resume(settings):
    run(observer=Recorder(at_step=2, action=interrupt))
    summary = run("samples.count=2", resume=True).summary
    assert len(summary["samples"]) == 2


def test_auto_is_the_dtype_that_the_run_began_with(settings, monkeypatch):
    """Another machine, or another number of threads, may choose another."""
    chosen = "lora_engine.backends.preferred_dtype"
    monkeypatch.setattr(chosen, lambda device: torch.bfloat16)
    auto = ("model.dtype=auto", "samples.count=0", "train.schedule=constant")
    run(*auto, "train.max_steps=1")
    assert load_config("out/config.yaml").model.dtype == "bfloat16"
    monkeypatch.setattr(chosen, lambda device: torch.float32)
    assert run(*auto, "train.max_steps=2", resume=True).summary["steps"] == 2
    with pytest.raises(
        UserError,
        match=r"made with dtype=bfloat16, float32, now dtype=float32 \("
        r"model\): change it back",
    ):
        run(*auto, "model.dtype=float32", "train.max_steps=2", resume=True)  # fmt: skip
