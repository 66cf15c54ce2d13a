"""Measurements of what the strategy and the head's chunks decide."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.journal import Journal, read
from benchmarks.gpu import tune_choice


def row(what: str, seconds: dict[str, float]) -> dict[str, Any]:
    return {"item": {"what": what, "sizes": [1, 2, 3]}, "seconds": seconds, "extra_bytes": {}}


def test_the_fastest_over_all_sizes_is_named_if_it_is_certain(tmp_path: Path) -> None:
    log = Journal(tmp_path / "choice.jsonl")
    present, noisy = {"augmented": 1.0, "again": 1.001}, {"augmented": 1.0, "again": 1.2}
    log.add("row", **row("forward", {**present, "two_segment": 0.8, "base_add": 0.9}))
    log.add("row", **row("forward", {**present, "two_segment": 1.1, "base_add": 0.9}))
    log.add("row", **row("dX", {**noisy, "two_segment": 0.9}))
    log.add("failure", item={}, message="out of memory")
    text = tune_choice.render(read(log.path or tmp_path))
    assert "- forward: base_add is 11.2% faster" in text  # two_segment loses at a size
    assert "- dX: stays (best other +21.7%, margin 40.0%)" in text
    assert "- out of memory" in text
    assert "| forward | 1 2 3 | two_segment |  800000 |          0.800 |" in text


def test_everything_is_measured_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "choice.jsonl"
    arguments = ["--device", "cpu", "--append", str(path), "--samples", "1"]
    assert tune_choice.main(arguments) == 0
    rows = [line for line in read(path) if line["event"] == "row"]
    assert [line["item"]["what"] for line in rows] == ["forward", "dX", "head"]
    assert set(rows[0]["seconds"]) == {"augmented", "two_segment", "base_add", "again"}
    assert tune_choice.main(arguments) == 0
    assert [line for line in read(path) if line["event"] == "row"] == rows
    assert "# Choices" in capsys.readouterr().out


def test_the_strategies_are_carried_out_and_agree() -> None:
    """Each run takes the way that it is named for, or there would be nothing to compare."""
    items = {item.what: item for item in tune_choice.items(torch.device("cpu"), torch.float32)}
    torch.manual_seed(0)
    outputs = [run()[0] for run in items["forward"].runs().values()]  # type: ignore[index]
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-4)
        assert not torch.equal(other, outputs[0]), "another order of the same sums"


def test_larger_chunks_are_taken_where_more_bytes_are_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    shipped = tune_choice.ops.linear_cross_entropy

    def record(*inputs: Any, chunk_rows: int) -> Any:
        asked.append(chunk_rows)
        return shipped(*inputs, chunk_rows=chunk_rows)

    monkeypatch.setattr(tune_choice.ops, "linear_cross_entropy", record)
    monkeypatch.setitem(tune_choice.MEBIBYTES, "cpu", (2, 1))
    monkeypatch.setitem(tune_choice.plans.CHUNK_BYTES, "cpu", 2**20)
    runs = tune_choice._head_runs((2048, 8, 2048), torch.device("cpu"), torch.float32)
    for run in runs.values():
        run()
    assert asked == [128, 256]
