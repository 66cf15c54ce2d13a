import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import journal
from benchmarks.gpu import gpu_report

ROOT = Path(__file__).parents[2]
FILES = {"environment.json", "check.log", "tests.xml", "report.md"}
JOURNALS = {"ceilings.jsonl", "kernels.jsonl", "lora_linear.jsonl", "train_step.jsonl"}


def check(out: Path, *options: object) -> tuple[int, dict[str, str], str]:
    """Exit status, outcomes by stage, report."""
    command = [sys.executable, "-m", "benchmarks.gpu.gpu_check", "--out", out, *options]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    stages = json.loads((out / "environment.json").read_text())["stages"]
    outcomes = {stage["name"]: stage["outcome"] for stage in stages}
    return done.returncode, outcomes, (out / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_everything_runs_here(tmp_path: Path) -> None:
    status, outcomes, report = check(tmp_path, "--minutes", 12)
    stages = ("environment", "build", "ceilings", "tests", "kernels", "lora_linear", "train_step")
    assert outcomes == dict.fromkeys(stages, "passed"), (tmp_path / "check.log").read_text()[-3000:]
    assert status == 0
    assert {path.name for path in tmp_path.iterdir()} == FILES | JOURNALS
    rows = [line for line in journal.read(tmp_path / "kernels.jsonl") if line["event"] == "row"]
    assert {row["implementation"] for row in rows} >= {"ours", "pytorch"}
    assert "| glu " in report and " failed" in report
    assert json.loads((tmp_path / "environment.json").read_text())["versions"]["torch"]


def test_a_failing_stage_does_not_hide_the_next(tmp_path: Path) -> None:
    status, outcomes, report = check(tmp_path, "--python", "/bin/false")
    assert status == 1
    assert outcomes["environment"].startswith("exit status 1")
    assert outcomes["build"] == "exit status 1"
    assert all(outcomes[name].startswith("not begun") for name in ("tests", "kernels"))
    assert "| build       | exit status 1" in report


def test_no_stage_begins_when_the_time_is_over(tmp_path: Path) -> None:
    status, outcomes, _ = check(tmp_path, "--minutes", 0)
    assert status == 1
    names = ("build", "tests", "kernels")
    assert [outcomes[name] for name in names] == ["not begun, the time was over"] * 3


def row(**fields: Any) -> dict[str, Any]:
    values = {
        "case": "glu",
        "size": "8192x576",
        "dtype": "bfloat16",
        "choice": {"impl": "triton", "reason": "Triton kernel, capability 9.0"},
        "pass": "forward",
        "implementation": "ours",
        "seconds": {"median": 8e-6, "queued": 4e-5},
        "rate": 3.9e12,
        "unit": "GB/s",
        "share_of_ceiling": 0.91,
        "extra_bytes": 2**20,
    }
    return {**values, **fields}


def test_the_report_is_made_from_what_is_there(tmp_path: Path) -> None:
    """A run that was killed: no test results, a torn line, an item without an end."""
    path = tmp_path / "kernels.jsonl"
    log = journal.Journal(path)
    glu, rope = ({"case": name, "size": "hopper", "dtype": "bfloat16"} for name in ("glu", "rope"))
    log.add("start", item=glu)
    log.add("row", item=glu, **row())
    log.add("failure", item=glu, message="glu: not timed, gradient 1: error 3")
    log.add("start", item=rope)
    with path.open("a") as file:
        file.write('{"event": "row", "ca')
    report = gpu_report.render(tmp_path)
    assert "| glu  | 8192x576 bfloat16 | forward | ours           | 8.0 | 3900.0 GB/s |" in report
    assert "- failure: glu: not timed, gradient 1: error 3" in report
    assert "Begun and not finished:\n- rope, hopper, bfloat16" in report
    assert "No results: " in report


def test_failed_tests_are_named(tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(
        "<testsuites><testsuite><testcase classname='tests.a' name='x'/>"
        "<testcase classname='tests.a' name='y'><failure message='1 is not 2'/></testcase>"
        "<testcase classname='tests.a' name='z'><skipped/></testcase></testsuite></testsuites>"
    )
    report = gpu_report.render(tmp_path)
    assert "1 passed, 1 failed, 1 skipped.\n- tests.a::y: 1 is not 2" in report


def test_a_torn_line_swallows_nothing(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"event": "start", "item": {"case": "glu"}}\n{"event": "ro')
    journal.Journal(path).add("start", item={"case": "rope"})
    assert journal.started(path) == [{"case": "glu"}, {"case": "rope"}]
