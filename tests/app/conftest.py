"""An empty working folder for every try, and the tiny model that some of them need."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_model import save_tiny_model
from tries import CONFIG, RECORDS


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder, to be copied and not to be changed."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, empty; nothing is asked of the network, and home is elsewhere."""
    place = tmp_path / "work"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for processes of their own
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return place


@pytest.fixture
def run_folder(folder: Path, saved_model: Path) -> Path:
    """The working folder with all that a run needs: run.yaml, rows.jsonl and the model tiny/."""
    shutil.copytree(saved_model, folder / "tiny")
    (folder / "rows.jsonl").write_text(RECORDS)
    (folder / "run.yaml").write_text(CONFIG)
    return folder


@pytest.fixture
def settings(tmp_path: Path, saved_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the data and the config, run.yaml, of a run of four steps."""
    torch.set_num_threads(1)  # on a busy machine, threads that wait for each other take minutes
    monkeypatch.chdir(tmp_path)
    rows = [
        {"messages": [{"role": "user", "content": f"double {i}"},
                      {"role": "assistant", "content": f"{i} {i}"}]}
        for i in range(60)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {saved_model}, dtype: float32, device: cpu}}\n"
        "data: {train: rows.jsonl, eval_fraction: 0.2}\n"
        "lora: {r: 4, alpha: 8}\n"
        "train: {output_dir: out, max_steps: 4, tokens_per_batch: 128, learning_rate: 0.01,\n"
        "        eval_every: 2, save_every: 1}\n"
        "samples: {count: 3, max_new_tokens: 5}\n"
        "evaluation: {probe: null}\n"
    )
    return tmp_path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, saved_model):
    """A folder with a configuration, its data and its finished run, to be copied."""
    from lora_engine.app.config import load_config
    from lora_engine.app.finetune import finetune

    place = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        shutil.copytree(saved_model, "tiny")
        Path("rows.jsonl").write_text(
            "".join(
                json.dumps({"prompt": f"{i}", "completion": f"is {i}"}) + "\n" for i in range(9)
            )
        )
        Path("run.yaml").write_text(CONFIG)
        finetune(load_config("run.yaml"))
    return place


@pytest.fixture
def finished(folder, finished_run):
    """The working folder is a copy of `finished_run`."""
    shutil.copytree(finished_run, folder, dirs_exist_ok=True)
    return folder
