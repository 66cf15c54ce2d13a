"""benchmarks/kernels/matmul.py measures every linear in both passes."""

import json
from pathlib import Path

from benchmarks.kernels import matmul


def test_every_linear_is_measured(tmp_path: Path) -> None:
    arguments = ["--rows", "40", "--samples", "2", "--out", str(tmp_path / "result")]
    matmul.main(arguments)
    found = json.loads((tmp_path / "result.json").read_text())["seconds"]
    assert [(each["linear"], each["pass"]) for each in found] == [
        (linear, direction) for linear in matmul.SHAPES for direction in ("forward", "backward")
    ]
    assert all(each[name] > 0 for each in found for name in ("ours", "torch.mm"))
    assert "ours GFLOP/s" in (tmp_path / "result.md").read_text()
