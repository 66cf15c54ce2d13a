import json

import pytest
import torch

from lora_engine.backends import preferred_dtype, timed_dtype


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def seconds(monkeypatch):
    """What the measurement will say, and how often it was asked."""
    seconds = {torch.float32: 2.0, torch.bfloat16: 1.0, "asked": 0}

    def measure(dtype):
        seconds["asked"] += 1
        return seconds[dtype]

    monkeypatch.setattr(timed_dtype, "_matmul_seconds", measure)
    return seconds


@pytest.mark.parametrize(
    ("bfloat16_seconds", "expected"),
    [(1.0, torch.bfloat16), (1.9, torch.float32), (40.0, torch.float32)],
    ids=["twice-as-fast", "hardly-faster", "slower"],
)
def test_takes_bfloat16_where_it_is_clearly_faster(seconds, bfloat16_seconds, expected):
    seconds[torch.bfloat16] = bfloat16_seconds
    assert preferred_dtype("cpu") == expected


def test_measures_once(seconds):
    assert preferred_dtype("cpu") == torch.bfloat16
    seconds[torch.float32] = 0.1
    assert preferred_dtype("cpu") == torch.bfloat16
    assert seconds["asked"] == 2


def test_measures_again_for_another_machine_or_a_damaged_file(seconds, tmp_path):
    preferred_dtype("cpu")
    path = tmp_path / "cache" / "lora_engine" / "cpu_dtype.json"
    path.write_text(json.dumps({"another CPU": "float32"}))
    preferred_dtype("cpu")
    assert json.loads(path.read_text())["another CPU"] == "float32"
    path.write_text("{")
    preferred_dtype("cpu")
    assert seconds["asked"] == 6


def test_a_cache_that_cannot_be_written_does_no_harm(seconds, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert preferred_dtype("cpu") == torch.bfloat16


def test_measures_for_real():
    assert preferred_dtype("cpu") in (torch.float32, torch.bfloat16)
    assert timed_dtype._matmul_seconds(torch.float32) > 0
