"""Runs that cannot go on, or would replace what is not theirs."""

import json
import threading
from pathlib import Path

import pytest
from tries import MISTAKE, Try, check, run, snapshot, tries

from lora_engine.training.run.folder import RunFolder


def every_checkpoint(name: str, content: bytes):
    def prepare(folder: Path) -> None:
        paths = list(folder.glob(f"run/checkpoints/*/{name}"))
        assert paths
        for path in paths:
            path.write_bytes(content)

    return prepare


def flipped(folder: Path) -> None:
    """One byte of each checkpoint's weights."""
    for path in folder.glob("run/checkpoints/*/weights.safetensors"):
        content = bytearray(path.read_bytes())
        content[-3] ^= 16
        path.write_bytes(content)


def other_weights(folder: Path) -> None:
    path = folder / "tiny/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)


def other_data(folder: Path) -> None:
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "new", "completion": "too"}\n')


def mine(name: str):
    """A file of the user's own."""

    def prepare(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")

    return prepare


def folder_for(name: str):
    """A folder of the user's own where the run has a file."""

    def prepare(folder: Path) -> None:
        path = folder / name
        if path.is_file():
            path.unlink()
        (path / "mine").mkdir(parents=True)

    return prepare


def resume(name: str, *words: str, settings=(), prepare=lambda folder: None, status=MISTAKE) -> Try:
    return Try(name, ["train", "run.yaml", *settings, "--resume"], words, {}, prepare, status)


def overwrite(name: str, prepare, *words: str) -> Try:
    return Try(name, ["train", "run.yaml", "train.overwrite=true"], words, {}, prepare)


FINISHED = [
    Try("used", ["train", "run.yaml"], ["run: already holds a run", "--resume", "overwrite"]),
    resume("another alpha", "run", "alpha", settings=["lora.alpha=5"]),
    resume("another rank", "run", "r=2", settings=["lora.r=3"]),
    resume("another dropout", "run", "dropout", settings=["lora.dropout=0.5"]),
    resume("rank stabilised", "run", "rslora", settings=["lora.rslora=true"]),
    resume("another rate", "learning_rate", settings=["train.learning_rate=0.5"]),
    resume("another seed", "seed", settings=["train.seed=5"]),
    resume("other batches", "tokens_per_batch", settings=["train.tokens_per_batch=128"]),
    resume("another length", "run", settings=["data.max_length=4"]),
    resume("other data", "run", "data", prepare=other_data),
    resume("other weights", "run", "weights", prepare=other_weights),
    resume("no run", "gone", "no run to resume", settings=["train.output_dir=gone"]),
    resume("states no JSON", "run", prepare=every_checkpoint("state.json", b"{oops")),
    resume("states a list", "run", prepare=every_checkpoint("state.json", b"[]")),
    resume("states nested", "run", prepare=every_checkpoint("state.json", b"[" * 100_000)),
    resume("states empty", "run", prepare=every_checkpoint("state.json", b"")),
    resume("states no text", "run", prepare=every_checkpoint("state.json", b"\xff\xfe")),
    resume("states a number", "run", prepare=every_checkpoint("state.json", b"9" * 5000)),
    resume("states of nothing", "run", prepare=every_checkpoint("state.json", b"{}")),
    resume("weights cut", "run", prepare=every_checkpoint("weights.safetensors", b"")),
    resume("moments garbage", "run", prepare=every_checkpoint("exp_avg.safetensors", b"x" * 99)),
    resume("one bit", "run", prepare=flipped),
    resume("file for checkpoints", "run", prepare=mine("run/checkpoints/step-00000009")),
    overwrite("file in the adapter", mine("run/adapter/notes.txt"), "notes.txt", "move it away"),
    overwrite("file in a checkpoint", mine("run/checkpoints/step-00000009/a.txt"), "a.txt"),
    overwrite("file for a checkpoint", mine("run/checkpoints/step-00000009"), "step-00000009"),
    overwrite("folder for metrics", folder_for("run/metrics.jsonl"), "metrics.jsonl"),
    overwrite("folder for summary", folder_for("run/summary.json"), "summary.json"),
    overwrite("folder for report", folder_for("run/report.html"), "report.html"),
    overwrite("folder for config", folder_for("run/config.yaml"), "config.yaml"),
    overwrite("folder for samples", folder_for("run/samples_before.json"), "samples_before.json"),
]

FRESH = [
    overwrite("own summary", mine("run/summary.json"), "summary.json", "move it away"),
    overwrite("own report", mine("run/report.html"), "report.html", "move it away"),
    overwrite("own config", mine("run/config.yaml"), "config.yaml", "move it away"),
    overwrite("own metrics", mine("run/metrics.jsonl"), "metrics.jsonl", "move it away"),
    overwrite("own adapter file", mine("run/adapter"), "adapter", "move it away"),
    overwrite("own adapter folder", mine("run/adapter/a.bin"), "a.bin", "move it away"),
    overwrite("own checkpoints file", mine("run/checkpoints"), "checkpoints", "move it away"),
    resume("nothing to resume", "run: holds no run to resume", "without --resume"),
]


@tries(FINISHED)
def test_after_a_finished_run(capfd, finished, entry):
    check(capfd, finished, entry)


@tries(FRESH)
def test_in_a_folder_of_the_users(capfd, run_folder, entry):
    check(capfd, run_folder, entry)


def test_two_runs_in_one_folder(capfd, run_folder):
    entered, leave = threading.Event(), threading.Event()

    def other_run():
        with RunFolder(run_folder / "run").locked():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other_run)
    thread.start()
    entered.wait(60)
    try:
        check(capfd, run_folder, Try("", ["train", "run.yaml"], ["run: ", "somewhere else"]))
    finally:
        leave.set()
        thread.join()


@pytest.mark.parametrize("content", [b"", b"{oops", b"[]", b"[" * 100_000, b"9" * 5000, b"\xff"])
def test_damaged_samples_and_reports_are_made_anew(capfd, finished, content):
    """They are no reason to end: what they held can be computed again."""
    for name in ("samples_before.json", "summary.json", "report.html"):
        (finished / "run" / name).write_bytes(content)
    weights = snapshot(finished / "run/adapter")["adapter_model.safetensors"]
    status, _, err = run(capfd, "train", "run.yaml", "--resume")
    assert (status, err) == (0, "")
    assert len(json.loads((finished / "run/summary.json").read_text())["samples"]) == 1
    assert snapshot(finished / "run/adapter")["adapter_model.safetensors"] == weights
