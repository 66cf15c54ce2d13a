"""`lora-engine bench`: finds the benchmarks, measures, writes; a mistake is one line."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from lora_engine.app import bench_commands, cli
from lora_engine.errors import UserError

MISTAKE = 2
TINY = ("sizes=tiny", "dtype=float32", "samples=3", "sweep=no")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(capsys, *arguments):
    """(exit status, standard output, standard error) of the command."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", *arguments])
    printed = capsys.readouterr()
    return caught.value.code, printed.out, printed.err


@pytest.fixture
def quick(monkeypatch):
    """The machine's ceilings are known already."""
    from benchmarks.common import ceilings

    def row(**item):
        return {"item": item, "seconds": {"median": 1.0}, "rate": 1e9}

    products = [row(ceiling="product", dtype=dtype) for dtype in ("float32", "bfloat16")]
    rows = [row(ceiling="copy", bytes=8), *products]
    monkeypatch.setattr(ceilings, "measured", lambda device: rows)


def test_kernels_are_measured_written_and_compared(capsys, tmp_path, quick):
    status, printed, told = run(capsys, "kernels", "cases=glu", *TINY, "--out", "out/a")
    assert status == 0
    assert "| glu  | tiny float32 | forward+backward | pytorch" in printed
    assert "glu, tiny" in told and "wrote out/a.json" in told
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"a.json", "a.md", "a.html", "a-roofline.svg", "a-times.svg"}
    found = json.loads((tmp_path / "out" / "a.json").read_text())
    assert found["limits"] == {"copy": 1e9, "products": {"float32": 1e9, "bfloat16": 1e9}}
    assert found["options"]["cases"] == "glu" and found["rows"][0]["calls"] > 0
    assert (
        "![Kernels below this machine's roofline](a-roofline.svg)"
        in (tmp_path / "out" / "a.md").read_text()
    )
    found["others_cores"] = 0.0  # a time beside busy programs would not be judged
    (tmp_path / "out" / "a.json").write_text(json.dumps(found))
    status, printed, _ = run(capsys, "compare", "out/a.json", "out/a.json")
    assert status == 0 and "none of ours became worse" in printed
    for row in found["rows"]:
        row["seconds"] = {
            **row["seconds"],
            "samples": 1000,
            "median": 100 * row["seconds"]["median"],
        }
    (tmp_path / "b.json").write_text(json.dumps(found))
    status, printed, _ = run(capsys, "compare", "out/a.json", "b.json")
    assert status == 1 and "2 of ours became worse" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernel"], "No such command 'kernel'."),
        (["kernels", "glu"], "glu: expected KEY=VALUE, as in rounds=3"),
        (["kernels", "cases=gluu"], "cases=gluu: no 'gluu'; did you mean glu?"),
        (["kernels", "sizes=huge,tiny"], "sizes=huge,tiny: no 'huge'; there is "),
        (["kernels", "round=3"], "round=3: kernels has no setting 'round'; there is cases"),
        (["kernels", "samples=0"], "samples=0: expected a whole number, at least 1"),
        (["kernels", "dtype=int8"], "dtype=int8: no 'int8'; there is bfloat16, float32"),
        (["kernels", "device=cuda"], "device=cuda: torch finds no GPU here; leave it out"),
        (["train", "rounds=2", "rounds=3"], "rounds=3: rounds is set twice"),
        (["train", "step=2"], "step=2: sft has no setting 'step'; did you mean steps?"),
        (["train", "contenders=trl"], "contenders=trl: no contender 'trl'; there is ours"),
        (["train", "--minutes", "-1"], "--minutes -1.0: expected a number of minutes"),
        (["train", "checkpointing=of"], "checkpointing=of: expected one of auto, on, off"),
        (["kernels", "cases=glu,rope,glu"], "cases=glu,rope,glu: glu is named twice"),
        (["kernels", "sizes=tiny,tiny"], "sizes=tiny,tiny: tiny is named twice"),
        (["memory", "lengths=1"], "lengths=1: expected at least 2"),
        (["rl", "jobs=dpo,dpo"], "jobs=dpo,dpo: dpo is named twice"),
        (["rl", "jobs=grpo", "generations=1"], "generations=1: expected at least 2"),
        (["rl", "jobs=grpo", "prompts=9999999"], "29999997 examples are wanted, there are"),
        (["train", "steps=9999999"], "80000000 examples are wanted, there are"),
        (["rl", "jobs=ppo"], "jobs=ppo: no 'ppo'; there is dpo, grpo"),
        (["rl", "pair=3"], "pair=3: dpo has no setting 'pair'; did you mean pairs?"),
        (["train", "--out", "."], "--out .: is a folder; name a file in it"),
        (["train", "--out", "file/x"], "--out file/x: file is a file; take another place"),
        (["train", "--out", ""], "--out: is empty, expected a path"),
        (["train", "model=./gone"], "./gone: no such model folder or file; check the path"),
        (["compare", "a.json"], "Missing argument 'B.json'."),
        (["compare", "a.json", "b.json"], "a.json: no such file; bench writes NAME.json"),
        (["compare", "file", "b.json"], "file: is not JSON; name the .json file"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_mistake_is_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    from lora_engine import backends

    monkeypatch.setattr(backends, "gpu_count", lambda: 0)
    (tmp_path / "file").write_text("")
    status, printed, told = run(capsys, *arguments)
    assert status == MISTAKE and printed == ""
    *preparing, last = told.splitlines()
    assert last.startswith(f"lora-engine: {message}")
    assert all(line.endswith(": preparing") for line in preparing)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_place_that_takes_no_files_is_told_before_anything_is_measured(capsys):
    status, printed, told = run(capsys, "train", "--out", "/proc/none/of/this")
    assert status == 1 and printed == "" and told.startswith("lora-engine: /proc/none/of/this: ")


def test_where_nothing_was_measured_the_status_says_so(capsys, monkeypatch, quick):
    from benchmarks.common import peers

    status, printed, _ = run(capsys, "kernels", "cases=glu", *TINY, "--minutes", "0")
    assert status == 1 and "1 of 1 left out, the time was over" in printed
    monkeypatch.setattr(peers, "version", lambda package: None)
    status, printed, _ = run(capsys, "train", "contenders=trl-padded")
    assert status == 1 and "sft: trl-padded not measured, trl is not installed" in printed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_it_as_an_interruption(capsys, monkeypatch, tmp_path, number):
    from benchmarks import bench

    def measure(*given):
        os.kill(os.getpid(), number)
        time.sleep(600)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(bench, "measure", measure)
    status, printed, told = run(capsys, "train")
    assert (status, printed, told) == (130, "", "lora-engine: interrupted\n")
    assert signal.getsignal(signal.SIGTERM) is before and not list(tmp_path.iterdir())


def test_the_command_can_be_run_again(monkeypatch):
    from benchmarks import bench

    monkeypatch.setattr(bench, "_commit", lambda: "abc")
    shown = bench._context("train", {"model": "my models/one", "steps": "2"})["command"]
    assert shown == "lora-engine bench train 'model=my models/one' steps=2"


def test_a_case_that_is_swept_and_asked_for_is_measured_once(capsys, tmp_path, quick, monkeypatch):
    from benchmarks.kernels import run as kernels

    asked = []
    monkeypatch.setattr(kernels, "run_items", lambda items, *_: asked.extend(items) or ([], [], []))
    run(capsys, "kernels", "cases=lora_linear", "sizes=smollm2-m64,tiny", "samples=3")
    places = [(item.case, item.size) for item in asked]
    assert len(places) == len(set(places)) == 6


def test_without_a_command_the_claim_is_measured(capsys, monkeypatch):
    from benchmarks import bench

    asked = []
    monkeypatch.setattr(bench, "bench", lambda *given, **more: asked.append((given, more)) or 0)
    run(capsys)
    run(capsys, "memory", "rounds=2", "--minutes", "3")
    (claim, more), (memory, own) = asked
    assert claim == ("train", []) and more["minutes"] == bench_commands.CLAIM_MINUTES == 10
    assert memory == ("memory", ["rounds=2"]) and own["minutes"] == 3


def test_the_benchmarks_are_found_beside_the_package_or_here(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", ["somewhere"])
    bench_commands.find_benchmarks()
    assert Path(sys.path[0], "benchmarks", "bench.py").is_file() and sys.path[1:] == ["somewhere"]
    installed = tmp_path / "site-packages" / "lora_engine" / "app" / "bench_commands.py"
    monkeypatch.setattr(bench_commands, "__file__", str(installed))
    with pytest.raises(UserError, match="come with the source, not with the installed package"):
        bench_commands.find_benchmarks()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "bench.py").touch()
    bench_commands.find_benchmarks()
    assert sys.path[0] == str(tmp_path)


def test_a_wrong_kernel_is_told_and_the_status_says_so(capsys, monkeypatch, quick):
    from dataclasses import replace

    from benchmarks.common.registry import CASES
    from benchmarks.kernels import cases  # noqa: F401  (registers the cases)

    build = CASES["glu"]

    def broken(*given):
        problem = build(*given)
        return replace(problem, ours=lambda gate, up: 2 * problem.eager(gate, up))

    monkeypatch.setitem(CASES, "glu", broken)
    status, printed, _ = run(capsys, "kernels", "cases=glu", *TINY)
    assert status == 1 and "## Wrong\n\n- glu: not timed, output 0" in printed
