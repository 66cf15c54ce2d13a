"""What compute-sanitizer and pytest print, as it is read."""

from benchmarks.gpu.sanitize import command, outcome

CLEAN = """\
========= COMPUTE-SANITIZER
10 passed, 2 skipped in 4.1s
========= ERROR SUMMARY: 0 errors
"""
FOUND = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 2 bytes
FAILED tests/ops/test_glu.py::test_a
1 failed, 9 passed in 4.1s
========= ERROR SUMMARY: 3 errors
"""
RACES = "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n10 passed in 9s\n"


def test_a_clean_shard() -> None:
    found = outcome(0, CLEAN)
    assert (found["errors"], found["tests"], found["log"]) == (0, {"passed": 10, "skipped": 2}, [])


def test_errors_and_failed_tests_are_told() -> None:
    found = outcome(9, FOUND)
    assert (found["errors"], found["tests"]) == (3, {"failed": 1, "passed": 9})
    assert "FAILED tests/ops/test_glu.py::test_a" in found["log"]
    assert any("Invalid __global__ read" in line for line in found["log"])
    assert outcome(9, RACES)["errors"] == 2


def test_a_shard_without_a_summary_is_not_clean() -> None:
    assert outcome(-1, "========= COMPUTE-SANITIZER\n")["errors"] == -1


def test_a_shard_is_its_own_part_of_the_tests() -> None:
    line = command("racecheck", "3/12", ["tests/ops"])
    assert line[:3] == ["compute-sanitizer", "--tool", "racecheck"]
    assert line[line.index("--shard") + 1] == "3/12" and line[-1] == "tests/ops"
