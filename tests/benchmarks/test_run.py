import json
import sys
from dataclasses import replace

import pytest
import run
import torch
from registry import CASES, SIZES

from lora_engine import backends

CPU = torch.device("cpu")
TINY = SIZES["tiny"]


def test_every_operation_has_a_case():
    assert set(CASES) == set(backends.OPERATIONS)


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
    ]
    assert all(row["seconds"]["median"] > 0 and row["rate"] > 0 for row in result["rows"])
    assert (tmp_path / "out.md").read_text().strip() == capsys.readouterr().out.strip()


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
    assert "| rms_norm | forward" in printed
    assert "| rope" not in printed
