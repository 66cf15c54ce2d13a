import sys

import head_memory
import pytest

from lora_engine import ops

# Logits of all rows would take 64 MiB in half precision, a chunk's take 8 in float32.
SIZES = {"rows": 128, "hidden": 32, "vocab": 262144, "chunk-rows": 8}


def run(monkeypatch: pytest.MonkeyPatch) -> None:
    options = [text for name, size in SIZES.items() for text in (f"--{name}", str(size))]
    monkeypatch.setattr(sys, "argv", ["head_memory.py", *options])
    head_memory.main()


def test_a_chunk_of_logits_is_all_it_takes(monkeypatch, capsys) -> None:
    run(monkeypatch)
    assert "extra memory" in capsys.readouterr().out


def test_more_memory_or_another_loss_is_an_error(monkeypatch, capsys) -> None:
    loss = ops.linear_cross_entropy
    monkeypatch.setattr(ops, "linear_cross_entropy", lambda *args, chunk_rows: loss(*args))
    with pytest.raises(SystemExit, match="1"):
        run(monkeypatch)
    monkeypatch.undo()
    monkeypatch.setattr(head_memory, "expected_loss", lambda *args: 0.0)
    with pytest.raises(SystemExit, match="1"):
        run(monkeypatch)
