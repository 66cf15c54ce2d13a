"""The tuner of launch parameters, with a timer that knows what is fast."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import journal
from benchmarks.gpu import tune, tune_report, tune_search, tune_table, tune_workers
from benchmarks.gpu.tune_cases import KERNELS, Case, all_cases
from benchmarks.gpu.tune_search import Decision, Measured, Parameters
from lora_engine.backends import tables

CAPABILITY = 90
# The shipped table changes by what is tested here.
TABLE: tune_table.Table = {
    "glu_fwd": {
        "*": {
            "*": [
                [4096, {"BLOCK_M": 4, "BLOCK_N": 512, "num_warps": 4}],
                [None, {"BLOCK_M": 2, "BLOCK_N": 1024, "num_warps": 4}],
            ]
        }
    },
    "cross_entropy": {
        "*": {"*": [[None, {"BLOCK_N": 8192, "num_warps": 32}]]},
        "90": {
            "*": [
                [24576, {"BLOCK_N": 4096, "num_warps": 8}],
                [None, {"BLOCK_N": 16384, "num_warps": 32}],
            ],
            "float32": [[None, {"BLOCK_N": 8192, "num_warps": 32}]],
        },
    },
    "rope": {"*": {"*": [[None, {"BLOCK_T": 1, "BLOCK_H": 16, "num_warps": 4}]]}},
    "adamw": {"*": {"*": [[None, {"BLOCK": 1024, "num_warps": 4}]]}},
}


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file with TABLE, which takes the shipped table's place."""
    monkeypatch.setattr(tables, "launch_table", lambda: TABLE)
    path = tmp_path / "table.json"
    path.write_text(tune_table.text(TABLE))
    return path


class FakeCompiler:
    """Compiles at once; `faults` says what is wrong with parameters."""

    def __init__(self, faults: Callable[[Parameters], list[str]] = lambda parameters: []) -> None:
        self.faults = faults

    def submit(self, cases: Sequence[Case], parameters: Parameters) -> "Future[list[str]]":
        future: Future[list[str]] = Future()
        future.set_result(self.faults(parameters))
        return future


class FakeMeasurer:
    """Launches take `seconds` of their parameters, and a thousandth more or less."""

    def __init__(self, seconds: Callable[[Case, Parameters], float]) -> None:
        self.seconds, self.random = seconds, random.Random(0)
        self.timed: list[Case] = []

    def check(self, case: Case, present: Parameters, parameters: Parameters) -> None:
        pass

    def time(
        self,
        case: Case,
        present: Parameters,
        runs: dict[str, Parameters],
        samples: int,
        ceiling: bool,
    ) -> dict[str, float]:
        self.timed.append(case)
        found = {
            name: self.seconds(case, parameters) * self.random.uniform(0.999, 1.001)
            for name, parameters in runs.items()
        }
        return {**found, "ceiling": 9e-6} if ceiling else found


def lines_of(*kernels: str) -> list[tune.Line]:
    return tune.lines(all_cases(kernels), CAPABILITY)


def tuned(
    path: Path,
    seconds: Callable[[Case, Parameters], float],
    *kernels: str,
    compiler: FakeCompiler | None = None,
) -> list[tune_report.Outcome]:
    log = journal.Journal(path)
    log.add("context", capability=CAPABILITY, device="cuda", command="", date="", hardware=GPU)
    compiler = compiler or FakeCompiler()
    deadline = time.monotonic() + 60
    tune.tune(lines_of(*kernels), compiler, FakeMeasurer(seconds), log, deadline)
    return tune_report.decisions(journal.read(path))


GPU = {"GPU": "a GPU"}


def warps_of_two(case: Case, parameters: Parameters) -> float:
    """Two warps are a fifth faster than any others."""
    return 8e-6 if parameters["num_warps"] == 2 else 1e-5


# The cases.


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_case_launches_its_kernel_at_its_launch_size(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from lora_engine.backends.triton import launch

    asked = []
    shipped = launch.launch_parameters

    def record(name: str, capability: Any, dtype: torch.dtype, size: int) -> Any:
        asked.append((name, size))
        return shipped(name, capability, dtype, size)

    monkeypatch.setattr(launch, "launch_parameters", record)
    case = KERNELS[kernel].cases[0].tiny()
    prepared = tune_workers.Prepared(case.call(torch.device("cpu")))
    results = prepared.results()
    assert (kernel, case.size()) in asked
    assert all(torch.isfinite(x.float()).all() for x in results), "it writes all that it says"
    assert prepared.call.bytes > 0
    kept = [x.clone() for x in results]
    assert all(
        tune_workers.difference(x, y) is None for x, y in zip(prepared.results(), kept, strict=True)
    )


def test_every_line_that_models_reach_has_cases() -> None:
    reached = {line.key for line in tune.lines(all_cases(), CAPABILITY)}
    wanted = [(size * 2, "rms_norm_fwd") for size in (576, 1024, 2048, 4096, 8192)]
    wanted += [(128256, "cross_entropy"), (49152, "cross_entropy"), (14336, "glu_bwd")]
    for size, kernel in wanted:
        assert tables.launch_key(kernel, CAPABILITY, "bfloat16", size) in reached


def test_a_case_comes_back_from_the_journal() -> None:
    for case in all_cases():
        assert Case.of(json.loads(json.dumps(case.fields()))) == case


def test_every_kernels_first_line_comes_first(table: Path) -> None:
    found = tune.in_turn(lines_of("glu_fwd", "cross_entropy"))
    names = ["glu_fwd", "cross_entropy", "glu_fwd"]
    assert [line.key.kernel for line in found] == names
    assert [line.key.limit for line in found] == [None, None, 4096]


# The candidates.


@pytest.mark.parametrize("kernel", tune_search.SEARCH)
def test_candidates_are_near_the_present_line_and_no_two_alike(kernel: str) -> None:
    for line in lines_of(kernel):
        found = tune_search.candidates(kernel, line.present)
        assert 2 <= len(found) <= tune_search.MOST_CANDIDATES
        assert line.present not in found
        assert len({tuple(sorted(p.items())) for p in found}) == len(found)
        changed = [sum(line.present[k] != p.get(k) for k in line.present) for p in found]
        assert changed == sorted(changed), "those that change least come first"
        for parameters in found:
            assert set(parameters) | {"maxnreg"} >= set(line.present)
            assert parameters.get("SPLIT", 0) in (0, 1)
            powers = [v for k, v in parameters.items() if k.startswith("BLOCK") or "warps" in k]
            assert all(v & (v - 1) == 0 for v in powers)
            assert 1 <= parameters["num_warps"] <= 32


def test_matrix_instructions_get_at_least_16_rows() -> None:
    present = {"BLOCK_M": 16, "BLOCK_K": 16, "num_warps": 1, "num_stages": 1}
    found = tune_search.candidates("lora_a_fwd", present)
    assert min(p[name] for p in found for name in ("BLOCK_M", "BLOCK_K")) == 16
    assert min(p["num_stages"] for p in found) == 1


def test_a_limit_on_registers_may_be_lifted() -> None:
    present = {"BLOCK_M": 1, "BLOCK_N": 8192, "num_warps": 16, "maxnreg": 64}
    found = tune_search.candidates("rms_norm_bwd", present)
    assert {"BLOCK_M": 1, "BLOCK_N": 8192, "num_warps": 16} in found


# The decision.

A, B = {"num_warps": 2}, {"num_warps": 8}


def measured(before: float, a: float, b: float | None = None, again: float = 1.0) -> Measured:
    pairs = ((A, a), *(() if b is None else ((B, b),)))
    return Measured({}, before, before * again, pairs, 1.0)


@pytest.mark.parametrize(
    ("sizes", "after"),
    [
        ([measured(1, 0.9), measured(1, 0.9)], A),
        ([measured(1, 0.99), measured(1, 0.99)], None),  # less than the least gain
        ([measured(1, 0.9, again=1.08), measured(1, 0.9)], None),  # 13 % in 16 % of noise
        ([measured(1, 0.5), measured(1, 1.05)], None),  # one size would lose
        ([measured(1, 0.5, 0.9), measured(1, 1.05, 0.9)], B),
        ([measured(1, 0.9, 0.8), measured(1, 0.9)], A),  # B was not measured at every size
        ([measured(1, 0.9, 0.85), measured(1, 0.9, 0.98)], A),
        ([measured(1, 1.2)], None),
        ([], None),
    ],
)
def test_a_line_changes_for_a_certain_gain_alone(
    sizes: list[Measured], after: Parameters | None
) -> None:
    assert tune_search.decide(sizes).after == after


def test_the_gain_is_of_all_sizes_and_against_both_measurements_of_the_present_line() -> None:
    found = tune_search.decide([measured(1.0, 0.8, again=1.0), measured(1.0, 0.5, again=1.0)])
    assert found == Decision(A, pytest.approx((1.25 * 2) ** 0.5), tune_search.LEAST_GAIN)
    found = tune_search.decide([measured(1.0, 0.8, again=1.02)])
    assert found.gain == pytest.approx(1.02**0.5 / 0.8)
    assert found.margin == pytest.approx(0.04)


def test_the_shortlist_is_of_the_fastest_over_all_sizes() -> None:
    times = [(1.0, {0: 0.9, 1: 0.7, 2: 1.5, 3: 1.0}), (2.0, {0: 1.0, 1: 2.0, 2: 3.0})]
    assert tune_search.shortlist(times, 3) == [0, 1]  # 2 is far off, 3 failed at the second size
    assert tune_search.shortlist(times, 1) == [0]
    assert tune_search.shortlist([(1.0, {})], 3) == []


# The table.


def test_the_table_is_kept_as_it_is_written() -> None:
    assert tune_table.text(tune_table.read()) == tune_table.TABLE.read_text()


def test_a_tuned_line_is_for_its_capability_alone(table: Path) -> None:
    given, new = tune_table.read(table), {"BLOCK_M": 1, "BLOCK_N": 1024, "num_warps": 2}
    found = tune_table.changed(given, 90, {("glu_fwd", "*", "*", 4096): new})
    assert given == TABLE, "what is given stays as it is"
    (first, second) = TABLE["glu_fwd"]["*"]["*"]
    assert found["glu_fwd"] == {"*": TABLE["glu_fwd"]["*"], "90": {"*": [[4096, new], second]}}
    assert first[1] != new
    del found["glu_fwd"]["90"]
    assert found == TABLE


def test_a_line_of_the_capability_is_changed_where_it_stands() -> None:
    new = {"BLOCK_N": 8192, "num_warps": 16}
    found = tune_table.changed(TABLE, 90, {("cross_entropy", "90", "*", None): new})
    before = TABLE["cross_entropy"]["90"]
    assert found["cross_entropy"]["90"]["*"] == [before["*"][0], [None, new]]
    assert found["cross_entropy"]["90"]["float32"] == before["float32"]
    for key in (("cross_entropy", "100", "*", None), ("cross_entropy", "90", "*", 7)):
        with pytest.raises(ValueError, match="cross_entropy"):
            tune_table.changed(TABLE, 90, {key: new})


# The whole.


def test_what_is_faster_comes_into_the_table(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = tuned(tmp_path / "tuning.jsonl", warps_of_two, "glu_fwd", "adamw")
    assert {o.key[0] for o in outcomes} == {"glu_fwd", "adamw"}
    for outcome in outcomes:
        assert outcome.decision.after is not None
        assert outcome.decision.after["num_warps"] == 2
        assert outcome.decision.gain == pytest.approx(1.25, rel=0.01)
    out = ["--out", str(tmp_path), "--write", "--table", str(table)]
    assert tune.main([*out, "--without", "adamw", "glu_fwd:4096"]) == 0
    written = tune_table.read(table)
    assert written["adamw"] == TABLE["adamw"]
    assert written["glu_fwd"]["90"]["*"][0] == TABLE["glu_fwd"]["*"]["*"][0]
    assert written["glu_fwd"]["90"]["*"][1][1]["num_warps"] == 2
    report = (tmp_path / "tuning.md").read_text()
    assert report == capsys.readouterr().out[:-1]
    assert "3 lines measured, 3 changed." in report
    row = next(x for x in report.splitlines() if "bfloat16 tokens=16384 cols=14336" in x)
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[1] == "glu_fwd"
    assert cells[5:7] == ["+25.0%", "112%"] or abs(float(cells[5].rstrip("%")) - 25) < 0.5
    assert tune.main(out) == 0
    again = table.read_text()
    assert tune.main(out) == 0
    assert table.read_text() == again, "written twice it is the same"


def test_a_table_is_not_written_from_a_cpu(tmp_path: Path) -> None:
    path = tmp_path / "tuning.jsonl"
    log = journal.Journal(path)
    log.add("context", capability=CAPABILITY, device="cpu", command="", date="", hardware=GPU)
    with pytest.raises(ValueError, match="not of one kind of GPU"):
        tune_report.capability(journal.read(path))


def test_faults_and_wrong_results_are_left_out(table: Path, tmp_path: Path) -> None:
    path = tmp_path / "tuning.jsonl"

    def faults(parameters: Parameters) -> list[str]:
        return ["8 bytes of stack"] if parameters["num_warps"] == 2 else []

    outcomes = tuned(path, warps_of_two, "adamw", compiler=FakeCompiler(faults))
    assert [o.decision.after for o in outcomes] == [None]
    rejected = [x for x in journal.read(path) if x["event"] == "rejected"]
    assert {x["parameters"]["num_warps"] for x in rejected} == {2}
    assert {x["message"] for x in rejected} == {"8 bytes of stack"}


def test_a_measurement_that_fails_costs_its_line_alone(table: Path, tmp_path: Path) -> None:
    def seconds(case: Case, parameters: Parameters) -> float:
        if case.kernel == "glu_fwd":
            raise tune_workers.WorkerError("the process ended with status -11")
        return warps_of_two(case, parameters)

    path = tmp_path / "tuning.jsonl"
    outcomes = tuned(path, seconds, "glu_fwd", "adamw")
    assert [o.key[0] for o in outcomes] == ["adamw"]
    failures = [x for x in journal.read(path) if x["event"] == "failure"]
    assert [x["item"]["line"][0] for x in failures] == ["glu_fwd", "glu_fwd"]
    assert "status -11" in tune_report.render(journal.read(path))


def test_a_second_run_goes_on_where_the_first_stopped(table: Path, tmp_path: Path) -> None:
    path = tmp_path / "tuning.jsonl"
    tuned(path, warps_of_two, "adamw")
    found = lines_of("adamw", "rope")
    left = tune.left_to_do(found, journal.read(path))
    assert "adamw" not in {line.key.kernel for line in left}
    assert len(left) == len(found) - 1
    with path.open("a") as file:  # what a killed run leaves
        file.write(json.dumps({"event": "start", "item": left[0].item()}) + '\n{"event": "ro')
    assert left[0] in tune.left_to_do(found, journal.read(path))
    for _ in range(tune.MOST_TRIES):
        journal.Journal(path).add("start", item=left[0].item())
    assert left[0] not in tune.left_to_do(found, journal.read(path))
    other = tune.Line(found[0].key, {"BLOCK": 64, "num_warps": 1}, found[0].cases)
    assert tune.left_to_do([other], journal.read(path)) == [other], "the line is another by now"


def test_no_line_begins_when_the_time_is_over(table: Path, tmp_path: Path) -> None:
    path = tmp_path / "tuning.jsonl"
    measurer = FakeMeasurer(warps_of_two)
    log = journal.Journal(path)
    left = tune.tune(lines_of("adamw", "rope"), FakeCompiler(), measurer, log, 0.0)
    assert left == len(lines_of("adamw", "rope"))
    assert not measurer.timed
    assert [x["event"] for x in journal.read(path)] == ["note"]


# The processes.


def make_answers() -> Callable[[Any], Any]:
    def answer(question: str) -> Any:
        if question == "die":
            os._exit(7)
        if question == "hang":
            time.sleep(60)
        if question == "fail":
            raise RuntimeError("out of resources")
        return question, os.getpid()

    return answer


@pytest.mark.skipif(sys.platform != "linux", reason="needs a fork server")
def test_a_process_that_is_lost_is_replaced() -> None:
    worker = tune_workers.Worker(make_answers)
    try:
        _, first = worker.ask("a", 60)
        with pytest.raises(tune_workers.WorkerError, match="RuntimeError: out of resources"):
            worker.ask("fail", 60)
        assert worker.ask("b", 60) == ("b", first), "an error alone costs no process"
        with pytest.raises(tune_workers.WorkerError, match="ended with status 7"):
            worker.ask("die", 60)
        _, second = worker.ask("c", 60)
        assert second != first
        with pytest.raises(tune_workers.WorkerError, match="no answer after 0 s"):
            worker.ask("hang", 0.3)
        assert worker.ask("d", 60)[1] not in (first, second)
    finally:
        worker.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_path_runs_in_the_interpreter(tmp_path: Path) -> None:
    """Processes that compile for a GPU, one that launches, and a second run with nothing to do."""
    pytest.importorskip("triton")
    options = ["--device", "cpu", "--kernels", "adamw", "--jobs", "1", "--candidates", "2"]
    command = [sys.executable, "-m", "benchmarks.gpu.tune", "--out", str(tmp_path), *options]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    lines = journal.read(tmp_path / "tuning.jsonl")
    events = [line["event"] for line in lines]
    assert events == ["context", "start", "first", "row", "end", "context"]
    assert set(lines[2]["seconds"]) == {"before", "0", "1"}
    assert "1 lines measured" in (tmp_path / "tuning.md").read_text()


def test_a_difference_is_found_where_there_is_one() -> None:
    x = torch.randn(100, dtype=torch.bfloat16)
    rounding = x + 2**-8 * x
    assert tune_workers.difference(rounding, x) is None
    assert tune_workers.difference(x.index_fill(0, torch.tensor([5]), float("nan")), x)
    wrong = x.clone()
    wrong[3] += 1
    assert "1 of 100 values differ" in (tune_workers.difference(wrong, x) or "")
    assert tune_workers.difference(wrong, x, looser=1e6) is None
    codes = torch.arange(10, dtype=torch.uint8)
    assert tune_workers.difference(codes + 1, codes) is None
    assert tune_workers.difference(codes + 2, codes) == "codes up to 2 apart"
