"""Runs that are killed or interrupted in a real process, and their continuation."""

import json
import multiprocessing
import os
import signal

import fit_worker
import pytest
import torch
from safetensors.torch import load_file

from lora_engine.training.run.checkpoint import CheckpointStore

# One server imports what takes seconds; every run is then a quick fork of it.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["peft", "transformers.models.llama.modeling_llama", "lora_engine.training.trainer"]
)


def start(folder, action):
    """A process running fit_worker.fit, and the pipe that it speaks through."""
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=fit_worker.fit, args=(folder, action, theirs))
    process.start()
    theirs.close()
    return process, ours


def finish(process, pipe):
    """What a process still says, or None, and its exit code: −n for signal n."""
    try:
        said = pipe.recv()
    except (EOFError, ConnectionResetError):
        said = None
    process.join(60)
    return said, process.exitcode


def run(folder, action):
    return finish(*start(folder, action))


def final_tensors(folder):
    """Everything of the last checkpoint: weights, moments, random state."""
    store = CheckpointStore(folder / "checkpoints")
    assert store.latest() == 9
    files = sorted(store.path(9).glob("*.safetensors"))
    assert len(files) == 4
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    return [load_file(path) for path in files] + [adapter]


def assert_equals_uninterrupted(folder, uninterrupted):
    expected = final_tensors(uninterrupted)
    for actual, wanted in zip(final_tensors(folder), expected, strict=True):
        assert actual.keys() == wanted.keys()
        assert all(torch.equal(actual[name], wanted[name]) for name in wanted)
    assert comparable_metrics(folder) == comparable_metrics(uninterrupted)


def comparable_metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    varying = {"tokens_per_second", "peak_memory_bytes"}
    return [{k: v for k, v in line.items() if k not in varying} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert run(folder, "run") == ("finished", 0)
    steps = [line["step"] for line in comparable_metrics(folder) if "loss" in line]
    assert steps == list(range(1, 10))
    return folder


# Checkpoints come at steps 0, 3, 6, 9, and at 4 if its evaluation is the best so far.
@pytest.mark.parametrize(
    ("actions", "kept"),
    [
        pytest.param(["kill-at-step-5"], [{3, 4}], id="between checkpoints"),
        pytest.param(["kill-while-saving-6"], [{3, 4}], id="while saving"),
        pytest.param(
            ["kill-at-step-1", "kill-while-saving-3", "kill-at-step-8"],
            [{0}, {0}, {6}],
            id="thrice",
        ),
    ],
)
def test_killed_runs_lose_only_the_steps_since_the_checkpoint(
    tmp_path, uninterrupted, actions, kept
):
    folder = tmp_path / "run"
    for action, newest in zip(actions, kept, strict=True):
        assert run(folder, action) == (None, -signal.SIGKILL)
        assert CheckpointStore(folder / "checkpoints").latest() in newest
    assert run(folder, "run") == ("finished", 0)
    assert_equals_uninterrupted(folder, uninterrupted)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name
)
def test_interrupted_runs_save_and_end_cleanly(tmp_path, uninterrupted, number):
    folder = tmp_path / "run"
    process, pipe = start(folder, "pause-at-step-5")
    assert pipe.recv() == "paused"
    os.kill(process.pid, number)
    pipe.send("go on")
    assert finish(process, pipe) == ("interrupted", 0)
    assert CheckpointStore(folder / "checkpoints").latest() == 5
    assert run(folder, "run") == ("finished", 0)
    assert_equals_uninterrupted(folder, uninterrupted)
