"""`log_to` with the services' own packages: what they keep of a run is read back from their files.

Weights & Biases, MLflow and Trackio are tested where the extra `track` is installed.
"""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / "support" / "tracked_run.py"


def tracked(service: str, package: str, place: Path, **environment: str) -> dict:
    """The losses of a run that is told to the service, with its files in `place`."""
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "default::lora_engine.errors.EngineWarning", RUN, service, "mine"],
        cwd=place,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "told no more" not in done.stderr, done.stderr
    losses = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(losses["train"]) == 3 and [step for step, _ in losses["heldout"]] == [0, 2, 3]
    return losses


def check(found: dict[str, dict[int, float]], losses: dict) -> None:
    """found: by name and step."""
    assert found["train/loss"] == pytest.approx(dict(enumerate(losses["train"], start=1)))
    assert found["heldout/loss"] == pytest.approx(dict(losses["heldout"]))
    assert set(found["train/learning_rate"]) == set(found["train/grad_norm"]) == {1, 2, 3}


def test_tensorboard(tmp_path):
    losses = tracked("tensorboard", "tensorboard", tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "mine" / "tensorboard"))
    events.Reload()
    check(
        {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]},
        losses,
    )
    (settings,) = events.Tensors("settings/text_summary")
    assert b"objective: sft" in settings.tensor_proto.string_val[0]


def test_mlflow(tmp_path):
    store = (tmp_path / "runs").as_uri()
    losses = tracked(
        "mlflow", "mlflow", tmp_path, MLFLOW_TRACKING_URI=store, MLFLOW_ALLOW_FILE_STORE="true"
    )
    (folder,) = (path.parent for path in (tmp_path / "runs").glob("*/*/metrics"))
    found = {}
    for file in (path for path in (folder / "metrics").rglob("*") if path.is_file()):
        lines = [line.split() for line in file.read_text().splitlines()]
        name = str(file.relative_to(folder / "metrics"))
        found[name] = {int(step): float(value) for _, value, step in (one[:3] for one in lines)}
    check(found, losses)
    assert (folder / "params" / "objective").read_text() == "sft"
    assert "run_name: mine" in (folder / "meta.yaml").read_text()


def test_trackio(tmp_path):
    losses = tracked("trackio", "trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "kept"))
    found: dict[str, dict[int, float]] = {}
    with sqlite3.connect(tmp_path / "kept" / "lora_engine.db") as kept:
        for run, step, values in kept.execute("select run_name, step, metrics from metrics"):
            assert run == "mine"
            for name, value in json.loads(values).items():
                found.setdefault(name, {})[step] = value
        ((config,),) = kept.execute("select config from configs")
    check(found, losses)
    assert json.loads(config)["objective"] == "sft"


def test_wandb_offline(tmp_path):
    losses = tracked("wandb", "wandb", tmp_path, WANDB_MODE="offline", WANDB_SILENT="true")
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = (tmp_path / "mine" / "wandb").glob("offline-run-*/*.wandb")
    found: dict[str, dict[int, float]] = {}
    config: dict[str, str] = {}
    name = ""
    for payload in records(file.read_bytes()):
        record = Record.FromString(payload)
        values = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        for key, value in values.items():
            found.setdefault(key, {})[record.history.step.num] = value
        if record.HasField("run"):
            name = record.run.display_name
            config = {one.key: one.value_json for one in record.run.config.update}
    check(found, losses)
    assert name == "mine" and json.loads(config["objective"]) == "sft"


def records(content: bytes) -> Iterator[bytes]:
    """Those of a log of LevelDB's format behind W&B's header of 7 bytes: blocks of 32 KiB of
    fragments, each with a checksum (4 bytes), a length (2) and a kind (1): 1 whole, 2 first,
    3 middle, 4 last."""
    place, begun = 7, b""
    while place < len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        begun += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield begun
            begun = b""
