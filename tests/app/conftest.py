"""An empty working folder for every try, and the tiny model that some of them need."""

import shutil
from pathlib import Path

import pytest
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
