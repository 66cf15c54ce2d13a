import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernels import head_memory

ROOT = Path(head_memory.__file__).parents[2]
# Logits of all rows take 64 MiB in half precision, a chunk's 4, and its sums in float32 8.
SIZES = {"rows": 128, "hidden": 64, "vocab": 262144, "chunk-rows": 8}
OPTIONS = [text for name, size in SIZES.items() for text in (f"--{name}", str(size))]
# Without chunk_rows all rows are one chunk.
ALL_ROWS_AT_ONCE = """
from lora_engine import ops
loss = ops.linear_cross_entropy
ops.linear_cross_entropy = lambda *inputs, chunk_rows: loss(*inputs)
"""


def run(preparation: str = "") -> "subprocess.CompletedProcess[str]":
    """In a process of its own: this one's allocator may keep what was freed, and hide a peak."""
    code = f"{preparation}\nfrom benchmarks.kernels import head_memory\nhead_memory.main()"
    command = [sys.executable, "-c", code, *OPTIONS]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_chunk_of_logits_is_all_it_takes() -> None:
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "extra memory" in done.stdout


def test_more_memory_is_an_error() -> None:
    done = run(ALL_ROWS_AT_ONCE)
    assert (done.returncode, done.stderr) == (1, "it takes more memory than the limit\n"), done


def test_another_loss_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["head_memory.py", "--rows=4", "--hidden=64", "--vocab=100"])
    monkeypatch.setattr(head_memory, "expected_loss", lambda *args: 0.0)
    with pytest.raises(SystemExit, match="the loss is not that of float32 logits"):
        head_memory.main()


def test_a_head_that_a_product_packs_whole_is_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        head_memory.parse_arguments(["--hidden", "32"])
    assert "--hidden 32: less than 64" in capsys.readouterr().err
