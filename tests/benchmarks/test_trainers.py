"""benchmarks/drop_in/trainers.py: what counts as the same, and the table of docs/drop-in.md."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.drop_in import trainers
from benchmarks.drop_in.trainer_cases import (
    TOLERANCE,
    Run,
    log_difference,
    moved,
    run,
    weight_difference,
)
from benchmarks.drop_in.trainer_setups import HUGGING_FACE

RESULTS = Path(trainers.__file__).parents[1] / "results"


def a_run(loss: float = 2.0, weight: float = 1.0, **logged: float) -> Run:
    weights = {"w": torch.full((4,), weight)}
    return Run([{"loss": loss, "step": 1, **logged}], {"w": torch.full((4,), 0.5)}, weights)


def test_differences_are_relative_and_named() -> None:
    assert log_difference(a_run(2.002), a_run())[0] == pytest.approx(1e-3)
    assert log_difference(a_run(2.002), a_run())[1] == "loss of step 1"
    assert log_difference(a_run(kl=1e-4), a_run(kl=0.0))[0] == pytest.approx(1e-4)
    assert log_difference(a_run(kl=5.0), a_run(kl=0.0), ("kl",))[0] == 0.0
    assert log_difference(a_run(kl=5.0), a_run(kl=0.0), ("kl of step 1",))[0] == 0.0
    beside = {"logps/chosen": -80.0}
    assert log_difference(a_run(kl=8e-4, **beside), a_run(kl=0.0, **beside))[0] == pytest.approx(
        1e-4
    )
    assert weight_difference(a_run(weight=1.01), a_run())[0] == pytest.approx(1e-2)
    assert moved(a_run()) == pytest.approx(0.5)


@pytest.mark.parametrize("other", [a_run(math.nan), a_run(kl=1.0)], ids=["nan", "more is logged"])
def test_what_cannot_be_compared_differs_infinitely(other: Run) -> None:
    assert log_difference(other, a_run())[0] == math.inf


def test_a_weight_that_is_no_number_is_not_the_same() -> None:
    ours, theirs = a_run(weight=math.nan), a_run()
    assert not trainers.is_same(of(ours))
    ours.end["other"] = theirs.end["other"] = torch.ones(1)
    assert weight_difference(ours, theirs) == (math.inf, "w")


def of(ours: Run) -> dict[str, Any]:
    return {
        "logged": log_difference(ours, a_run())[0],
        "weights": weight_difference(ours, a_run())[0],
    }


def test_verdicts() -> None:
    assert trainers.verdict(of(a_run(2.000002))) == "same, 1e-06 and 0e+00"
    assert trainers.verdict(of(a_run(weight=1.1))) == "**differs**, 0e+00 and 1e-01"
    stopped = {"error": "ValueError: no"}
    assert trainers.verdict(stopped) == "stops: ValueError: no" and not trainers.is_same(stopped)


@pytest.mark.parametrize("setting", [{"learning_rate": 1.01e-3}, {"adam_beta2": 0.99}])
def test_another_update_is_noticed(setting: dict[str, float], tmp_path: Path) -> None:
    case = HUGGING_FACE["default"]
    plain, other = run(case, None, tmp_path), run(case, None, tmp_path, **setting)
    assert log_difference(other, plain, ("learning_rate",))[0] > 2 * TOLERANCE
    assert weight_difference(other, plain)[0] > 2 * TOLERANCE


def test_the_table_goes_where_its_markers_are(tmp_path: Path) -> None:
    result = tmp_path / "some.json"
    result.write_text(
        json.dumps({"trainers": {"T": {"before": of(a_run()), "after": of(a_run())}}})
    )
    page = f"Above\n{trainers.PART.start}old -->\n| old |{trainers.PART.end}\nBelow\n"
    written = trainers.with_table(page, result)
    assert written.startswith(
        f"Above\n{trainers.PART.start}benchmarks/results/some.json -->\n| trainer"
    )
    assert "| T       | same, 0e+00 and 0e+00 |" in written and "old" not in written
    assert written.endswith(f"{trainers.PART.end}\nBelow\n")
    with pytest.raises(ValueError, match="no place"):
        trainers.with_table("nothing", result)


def test_the_page_shows_the_committed_result() -> None:
    page = trainers.PAGE.read_text()
    source = trainers.PART.source(page)
    result = RESULTS / Path(source).name
    assert page == trainers.with_table(page, result), (
        f"docs/drop-in.md is out of date: python -m benchmarks.drop_in.trainers --page {source}"
    )
    measured = json.loads(result.read_text())["trainers"]
    assert measured.keys() == trainers.CASES.keys()
    assert all(trainers.is_same(d) for each in measured.values() for d in each.values())
