"""`pytest benchmarks --benchmark-only` runs the registry that `lora-engine bench` runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_pytest_runs_the_registry(tmp_path):
    out = tmp_path / "out.json"
    options = ["--benchmark-only", "--bench-size", "tiny", "--bench-dtype", "float32"]
    options += [f"--benchmark-json={out}", "--benchmark-max-time=0.01", "-k", "glu-ours or adamw"]
    command = [sys.executable, "-m", "pytest", "benchmarks", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())["benchmarks"]
    groups = {(x["group"], x["param"]) for x in found}
    assert ("glu, tiny, float32", "glu-ours") in groups
    assert ("adamw, tiny, float32", "adamw-pytorch fused") in groups
    assert all(x["stats"]["median"] > 0 for x in found)
