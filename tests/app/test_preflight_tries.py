"""The try before a run on the command line: its line, its switch, and what it stops."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tries import MISTAKE, Try, check, run, snapshot

from lora_engine.app import cli


def measured(folder):
    text = (folder / "metrics.jsonl").read_text()
    return [x["loss"] for x in map(json.loads, text.splitlines()) if "loss" in x]


def test_it_is_one_line_and_changes_nothing_of_the_run(capfd, run_folder):
    losses, weights = [], []
    for name, switch in (("one", "--preflight"), ("two", "--no-preflight"), ("three", None)):
        settings = [f"train.output_dir={name}", "lora.dropout=0.3", "train.max_steps=3"]
        arguments = ["train", "run.yaml", *settings, *([switch] if switch else [])]
        status, out, err = run(capfd, *arguments)
        assert (status, err) == (0, "")
        told = [line for line in out.splitlines() if line.startswith("preflight: ")]
        summary = json.loads((run_folder / name / "summary.json").read_text())
        if switch == "--no-preflight":
            assert told == [] and summary["preflight"] is None
            assert summary["config"]["train"]["preflight"] is False
        else:
            [line] = told
            report = summary["preflight"]
            assert line.startswith(
                f"preflight: loss {report['loss_before']:.4g} falls to {report['loss_after']:.4g}"
            )
            assert report["parameters"] == 28
        losses.append(measured(run_folder / name))
        weights.append(snapshot(run_folder / name / "adapter")["adapter_model.safetensors"])
    assert len(losses[0]) == 3
    assert losses[0] == losses[1] == losses[2]
    assert weights[0] == weights[1] == weights[2]


def test_it_runs_again_where_a_run_goes_on(capfd, run_folder):
    run(capfd, "train", "run.yaml")
    status, out, _ = run(capfd, "train", "run.yaml", "--resume")
    assert status == 0 and "preflight" not in out  # all is done
    status, out, _ = run(capfd, "train", "run.yaml", "--resume", "train.max_steps=4")
    assert status == 0 and out.count("preflight: ") == 1


def nan_weights(folder):
    path = folder / "tiny/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_run_that_would_learn_nothing_ends_with_its_line(capfd, run_folder):
    entry = Try(
        "not finite",
        ["train", "run.yaml", "samples.count=0"],
        ["preflight: the loss is nan; first bad layer", "layers.1.mlp.up_proj"],
        prepare=nan_weights,
        status=MISTAKE,
    )
    check(capfd, run_folder, entry)
    assert not (run_folder / "run/checkpoints").exists()


def test_ctrl_c_in_the_middle_leaves_no_run(capfd, run_folder, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_engine.training.trainer.preflight", interrupted)
    status, _, err = run(capfd, "train", "run.yaml")
    assert status == 130
    assert "there is no checkpoint yet, start again with the same command" in err
    monkeypatch.undo()
    monkeypatch.chdir(run_folder)
    assert run(capfd, "train", "run.yaml")[0] == 0


def test_help_names_both_switches(capfd):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    out = capfd.readouterr().out
    assert "--preflight / --no-preflight" in out
    assert "[default: (preflight)]" in " ".join(out.split())
