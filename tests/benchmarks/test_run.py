import json
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from benchmarks.common import journal, measure
from benchmarks.common.registry import CASES, SIZES, Contender
from benchmarks.kernels import run
from lora_engine import backends

CPU = torch.device("cpu")
TINY = SIZES["tiny"]


@pytest.fixture(autouse=True)
def few_inputs(monkeypatch):
    monkeypatch.setattr(measure, "MOST_SETS", 2)


# What an operation without a case searches for has many answers as good, and no peer in PyTorch.
SEARCHES = {"k_quants"}


def test_every_operation_has_a_case():
    problems = {name: build(TINY, torch.float32, CPU) for name, build in CASES.items()}
    found = {problem.operation or name for name, problem in problems.items()}
    assert found == set(backends.OPERATIONS) - SEARCHES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_ours_matches_the_reference(name, dtype):
    torch.manual_seed(0)
    problem = CASES[name](TINY, dtype, CPU)
    run.verify(problem, problem.ours)


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_result_is_not_timed(name):
    problem = CASES[name](TINY, torch.float32, CPU)

    def wrong(*inputs):
        outputs = run.as_tuple(problem.ours(*inputs))
        return (outputs[0] * 1.001, *outputs[1:])

    with pytest.raises(AssertionError, match="output 0"):
        run.verify(problem, wrong)


def test_a_wrong_gradient_is_not_timed():
    problem = CASES["glu"](TINY, torch.float32, CPU)
    with pytest.raises(AssertionError, match="gradient 1"):
        run.verify(problem, lambda gate, up: problem.ours(gate, up.detach() + 0 * up))


def test_verifying_leaves_the_inputs_alone():
    problem = CASES["adamw"](TINY, torch.float32, CPU)
    before = [x.clone() for x in problem.inputs]
    run.verify(problem, problem.ours)
    assert all(torch.equal(x, y) for x, y in zip(problem.inputs, before, strict=True))


def test_results_are_printed_and_written(tmp_path, monkeypatch, capsys):
    command = ["run.py", "--size", "tiny", "--dtype", "float32", "--samples", "1"]
    command += ["--cases", "rms_norm", "adamw", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    run.main()
    result = json.loads((tmp_path / "out.json").read_text())
    rows = [(row["case"], row["pass"], row["implementation"]) for row in result["rows"]]
    assert rows == [
        ("rms_norm", "forward", "ours"),
        ("rms_norm", "forward", "pytorch"),
        ("rms_norm", "forward+backward", "ours"),
        ("rms_norm", "forward+backward", "pytorch"),
        ("adamw", "step", "ours"),
        ("adamw", "step", "pytorch"),
        ("adamw", "step", "pytorch foreach"),
        ("adamw", "step", "pytorch fused"),
    ]
    assert all(row["seconds"]["median"] > 0 and row["rate"] > 0 for row in result["rows"])
    assert (tmp_path / "out.md").read_text().strip() == capsys.readouterr().out.strip()


@pytest.mark.slow
def test_a_failing_case_is_reported_and_the_others_still_run(monkeypatch, capsys):
    build = CASES["rope"]

    def broken(*args):
        problem = build(*args)
        return replace(problem, ours=lambda *inputs: tuple(2 * y for y in problem.eager(*inputs)))

    monkeypatch.setitem(CASES, "rope", broken)
    command = ["run.py", "--size", "tiny", "--samples", "1", "--cases", "rope", "rms_norm"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="1"):
        run.main()
    printed = capsys.readouterr().out
    assert "rope: not timed, output 0" in printed
    assert "| rms_norm | tiny bfloat16 | forward" in printed
    assert "| rope" not in printed


def run_with(monkeypatch, *options):
    command = ["run.py", "--size", "tiny", "--dtype", "float32", "--samples", "1", *options]
    monkeypatch.setattr(sys, "argv", command)
    run.main()


@pytest.mark.slow
def test_results_are_appended_as_they_come_and_not_made_twice(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.jsonl"
    run_with(monkeypatch, "--cases", "glu", "--append", str(path))
    run_with(monkeypatch, "--cases", "glu", "adamw", "--append", str(path))
    events = [(x["event"], x.get("case")) for x in journal.read(path)]
    glu = [("row", "glu")] * 4
    adamw = [("row", "adamw")] * 4
    item = [("start", None), ("end", None)]
    assert events == [
        *[("context", None), item[0], *glu, item[1]],
        *[("context", None), item[0], *adamw, item[1]],
    ]
    capsys.readouterr()


def test_an_error_is_recorded_and_the_next_case_runs(tmp_path, monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("no\nmemory")

    monkeypatch.setitem(CASES, "rope", broken)
    path = tmp_path / "results.jsonl"
    with pytest.raises(SystemExit, match="1"):
        run_with(monkeypatch, "--cases", "rope", "glu", "--append", str(path))
    lines = journal.read(path)
    failures = [x["message"] for x in lines if x["event"] == "failure"]
    assert failures == ["rope: not timed, RuntimeError: no memory"]
    assert sum(x["event"] == "row" for x in lines) == 4
    assert failures[0] in capsys.readouterr().out


def test_nothing_begins_after_the_time(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.jsonl"
    run_with(monkeypatch, "--cases", "glu", "rope", "--minutes", "0", "--append", str(path))
    assert [x["event"] for x in journal.read(path)] == ["context", "note"]
    assert "2 of 2 left out, the time was over" in capsys.readouterr().out


def test_a_lost_device_ends_the_run(tmp_path, monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setitem(CASES, "rope", broken)
    monkeypatch.setattr(run, "_usable", lambda device: False)
    path = tmp_path / "results.jsonl"
    with pytest.raises(SystemExit, match=str(run.DEVICE_LOST)):
        run_with(monkeypatch, "--cases", "rope", "glu", "--append", str(path))
    assert [x["event"] for x in journal.read(path)] == ["context", "start", "failure"]
    monkeypatch.undo()
    run_with(monkeypatch, "--cases", "rope", "glu", "--append", str(path))
    cases = {x["case"] for x in journal.read(path) if x["event"] == "row"}
    assert cases == {"glu"}, "what lost the device is not begun again"
    capsys.readouterr()


def test_a_wrong_contender_is_left_out_and_ours_is_timed(monkeypatch, capsys):
    def others(item, problem, device):
        yield "double", Contender(lambda *inputs: 2 * problem.eager(*inputs))
        yield "broken", Contender(lambda *inputs: 1 / 0)
        yield "same", Contender(problem.eager)

    monkeypatch.setattr(run, "_others", others)
    run_with(monkeypatch, "--cases", "glu")
    printed = capsys.readouterr().out
    assert "glu, tiny: double not timed, output 0: error" in printed
    assert "glu, tiny: broken not timed, ZeroDivisionError" in printed
    assert "| same " in printed and "| ours " in printed and "| double " not in printed


def test_a_contender_that_fails_where_it_is_timed_is_left_out(monkeypatch, capsys):
    """What is timed of another package may be other calls than those that are verified."""

    def fail(inputs, backward):
        raise RuntimeError("no such\ndevice")

    def with_a_peer(name, problem, device):
        yield "peer", Contender(problem.ours, timed=fail)

    monkeypatch.setattr(run.kernel_peers, "contenders", with_a_peer)
    run_with(monkeypatch, "--cases", "glu")
    shown = capsys.readouterr().out
    assert "glu, tiny: peer not timed, RuntimeError: no such device" in shown
    assert "| ours" in shown and "| peer" not in shown


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_an_in_place_contender_has_inputs_of_its_own(backward):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gate, up):
            gate.data.mul_(2)
            return gate + up

        @staticmethod
        def backward(ctx, dy):
            dy.data.mul_(2)
            return dy.clone(), dy.clone()

    problem = CASES["glu"](TINY, torch.float32, CPU)
    before = [x.detach().clone() for x in problem.inputs]
    thunk = run._run(problem, Contender(Doubled.apply, in_place=True), backward=backward)
    results = []
    for _ in range(2):
        thunk.restore()
        results.append([x.clone() for x in run.as_tuple(thunk())])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(problem.inputs, before, strict=True))
    again = run.as_tuple(thunk())
    assert not torch.equal(again[0], results[0][0]), "it does change what it is given"


@pytest.mark.slow
def test_of_a_large_size_a_part_is_verified(monkeypatch, capsys):
    monkeypatch.setattr(run, "VERIFIED_TOKENS", 7)
    verified = []
    references = run.references
    monkeypatch.setattr(run, "references", lambda p: verified.append(p) or references(p))
    run_with(monkeypatch, "--cases", "glu", "attention", "adamw")
    assert [len(problem.inputs[0]) for problem in verified[:2]] == [7, 7]
    printed = capsys.readouterr().out
    assert "glu, tiny: verified on 7 of 13 tokens, 4 of 4 targets" in printed
    assert "attention, tiny: verified on" in printed and "adamw, tiny: verified on" not in printed

    build = CASES["glu"]

    def broken(*args):
        problem = build(*args)
        return replace(problem, ours=lambda gate, up: 2 * problem.eager(gate, up))

    monkeypatch.setitem(CASES, "glu", broken)
    with pytest.raises(SystemExit, match="1"):
        run_with(monkeypatch, "--cases", "glu")
    assert "glu: not timed, output 0" in capsys.readouterr().out


def test_torch_compile_takes_part(monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: compiled.append(dynamic) or f)
    run_with(monkeypatch, "--cases", "glu", "--compile")
    assert compiled == [False]
    assert "| torch.compile " in capsys.readouterr().out


def test_every_call_takes_the_next_inputs(monkeypatch):
    """Those of one problem for one call, and all of them in turn."""
    called = []
    build = CASES["glu"]

    def watched(*args):
        problem = build(*args)

        def ours(gate, up):
            assert gate.data_ptr() == problem.inputs[0].data_ptr(), "another problem's inputs"
            called.append(float(gate.detach()[0, 0]))
            return problem.ours(gate, up)

        return replace(problem, ours=ours)

    monkeypatch.setitem(CASES, "glu", watched)
    problem = watched(TINY, torch.float32, CPU)
    sets = run.input_sets(run.Item("glu", "tiny", "float32"), problem, ["ours"], CPU)
    rows = list(run.measure_case(sets, CPU, samples=1))
    assert len(set(called)) == 2 and all(a != b for a, b in pairwise(called[2:9]))
    assert {row["implementation"] for row in rows} == {"ours"}
    assert all(row["input_sets"] == 2 and row["calls"] > 0 for row in rows)
