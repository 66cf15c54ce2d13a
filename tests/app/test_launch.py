"""`train --nproc N`: real processes, whatever ends them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lora_engine.app import cli, launch
from lora_engine.training.run.checkpoint import CheckpointStore

SHARED = "train.gradient_accumulation_steps=2"


class Started:
    """A launcher of two processes that train, and the numbers of its processes."""

    def __init__(self, *words):
        command = [*PROGRAM, "train", "run.yaml", "--nproc", "2", SHARED, *words]
        self.launcher = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def wait_for_step(self, step, folder):
        until = time.monotonic() + 120
        while time.monotonic() < until and self.launcher.poll() is None:
            if CheckpointStore(folder / "run" / "checkpoints").path(step).is_dir():
                return
            time.sleep(0.05)
        raise AssertionError(self.launcher.communicate())

    def processes(self):
        """By rank."""
        found = {}
        for child in os.listdir("/proc"):
            try:
                with open(f"/proc/{child}/environ", "rb") as file:
                    variables = dict(
                        x.split(b"=", 1) for x in file.read().split(b"\0") if b"=" in x
                    )
                with open(f"/proc/{child}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            if parent == self.launcher.pid:
                found[int(variables[b"RANK"])] = int(child)
        return found

    def end(self):
        """Exit status, and the lines on standard error."""
        out, err = self.launcher.communicate(timeout=250)
        self.out = out
        return self.launcher.returncode, err.splitlines()


PROGRAM = [sys.executable, "-c", "from lora_engine.app.cli import main; main()"]
ENDLESS = ("train.max_steps=100000", "train.save_every=1", "train.keep_checkpoints=2")


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_two_processes_make_what_one_does(run_folder):
    one = [*PROGRAM, "train", "run.yaml", SHARED, "train.output_dir=alone"]
    subprocess.run(one, check=True, capture_output=True)
    started = Started()
    assert started.end() == (0, [])
    assert "held-out" in started.out and started.out.count("loading tiny") == 1
    alone, together = (
        json.loads((run_folder / name / "summary.json").read_text()) for name in ("alone", "run")
    )
    for key in ("heldout_loss_before", "heldout_loss_after"):
        assert together[key] == pytest.approx(alone[key], rel=1e-4)
    for key in ("steps", "train_tokens", "samples", "stopped"):
        assert together[key] == alone[key]
    files = [
        sorted(p.relative_to(f) for p in f.rglob("*"))
        for f in map(run_folder.joinpath, ("alone", "run"))
    ]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_saves_and_ends_all(run_folder, number):
    started = Started(*ENDLESS)
    started.wait_for_step(2, run_folder)
    processes = started.processes()
    assert set(processes) == {0, 1}
    started.launcher.send_signal(number)
    status, lines = started.end()
    assert status == 130
    assert lines == [
        "lora-engine: interrupted; continue with: lora-engine train run/config.yaml --resume"
    ]
    assert not any(map(is_running, processes.values()))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run_with_one_line(run_folder, rank):
    started = Started(*ENDLESS)
    started.wait_for_step(2, run_folder)
    processes = started.processes()
    os.kill(processes[rank], signal.SIGKILL)
    killed = time.monotonic()
    status, lines = started.end()
    assert time.monotonic() - killed < 30
    assert status == 1
    assert len(lines) == 1, lines
    assert ("process 0 was ended by SIGKILL" if rank == 0 else "is gone without a word") in lines[0]
    assert not any(map(is_running, processes.values()))
    store = CheckpointStore(run_folder / "run" / "checkpoints")
    assert store.newest_sound() >= 2
    assert not [p for p in store.folder.iterdir() if p.name.startswith(".tmp")] or rank == 0


@pytest.mark.slow
def test_processes_end_with_a_launcher_that_is_killed(run_folder):
    started = Started(*ENDLESS)
    started.wait_for_step(1, run_folder)
    processes = started.processes()
    started.launcher.kill()
    until = time.monotonic() + 20
    while any(map(is_running, processes.values())) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(is_running, processes.values()))


@pytest.mark.slow
def test_a_mistake_is_told_once(run_folder):
    started = Started("train.learning_rat=1")
    status, lines = started.end()
    assert status == 2
    assert len(lines) == 1 and "did you mean train.learning_rate?" in lines[0]


def test_the_outcome_of_processes():
    gone = "process 0 was ended by SIGKILL, and the others with it"
    assert launch._outcome([0, 0], False, False) == (0, "")
    assert launch._outcome([2, 1], False, False) == (2, "")
    assert launch._outcome([130, 0], False, True) == (130, "")
    assert launch._outcome([-9, 1], False, False) == (1, gone)
    assert launch._outcome([1, -9], False, False) == (1, "")  # the first process tells
    assert launch._outcome([-9, -9], True, True) == (1, "")


@pytest.mark.slow
def test_torchrun_starts_the_same_run(run_folder):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "--no-python", *PROGRAM, "train", "run.yaml", SHARED]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loading tiny") == 1
    assert (run_folder / "run" / "report.html").is_file()


def test_processes_are_not_started_by_each_of_torchruns(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "demo", "--nproc", "2"])
    assert "--nproc: torchrun has started the processes already" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_that_processes_share_is_trained_as_a_whole_one(run_folder):
    one = [*PROGRAM, "train", "run.yaml", SHARED, "train.output_dir=alone"]
    packed = ["model.quantize=nf4", "model.shard=true"]
    subprocess.run([*one, *packed], check=True, capture_output=True)
    started = Started(*packed)
    assert started.end() == (0, [])
    alone, together = (
        json.loads((run_folder / name / "summary.json").read_text()) for name in ("alone", "run")
    )
    assert together["heldout_loss_after"] == pytest.approx(alone["heldout_loss_after"], rel=1e-4)
    assert together["samples"] == alone["samples"]
    # Another number of processes goes on with it, whether the weights are shared or not.
    longer = ["train.max_steps=4", "model.quantize=nf4", "--resume"]
    done = subprocess.run([*one[:-1], *longer], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
