"""trainer_speed.py: what is made of its runs, and the table of docs/drop-in.md."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.drop_in import trainer_speed

RESULTS = Path(trainer_speed.__file__).parents[1] / "results"


def a_run(when: str, seconds: list[float], peak: int, losses: list[float]) -> dict[str, Any]:
    return {
        "trainer": "SFT",
        "setup": "bfloat16",
        "when": when,
        "seconds": seconds,
        "losses": losses,
        "loaded": 1,
        "peak": peak,
        "attached": 0.0,
    }


def test_ratios_are_taken_within_a_round_and_leave_the_first_step_out() -> None:
    runs = [
        a_run("plain", [99.0, 4.0, 4.0], 400, [3.0, 2.0]),
        a_run("accelerated", [99.0, 1.0, 3.0], 100, [3.0, 2.25]),
        a_run("plain", [0.0, 9.0, 9.0], 300, [3.0, 2.0]),
        a_run("accelerated", [0.0, 3.0, 3.0], 120, [3.0, 2.25]),
    ]
    (row,) = trainer_speed.summary({"runs": runs})
    assert row["faster"] == pytest.approx(2.5) and row["range"] == [2.0, 3.0]
    assert row["peak"] == {"plain": 400, "accelerated": 120}
    assert row["loss difference"] == pytest.approx(0.25)


def test_unknown_trainers_and_setups_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        trainer_speed.parse_arguments(["--trainers", "SFT,PPO"])
    assert "PPO: not of SFT, DPO, GRPO" in capsys.readouterr().err


def test_the_page_shows_the_committed_result() -> None:
    page = trainer_speed.PAGE.read_text()
    source = trainer_speed.PART.source(page)
    result = RESULTS / Path(source).name
    assert page == trainer_speed.with_table(page, result), (
        f"docs/drop-in.md is old: python -m benchmarks.drop_in.trainer_speed --page {source}"
    )
    rows = {row["trainer"]: row for row in trainer_speed.summary(json.loads(result.read_text()))}
    assert rows.keys() == set(trainer_speed.TRAINERS)
