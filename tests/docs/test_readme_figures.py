"""The README's figures are those of committed results."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import journal, results

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
GIB = 2**30


def rows_of(name: str) -> dict[str, Any]:
    return {row["implementation"]: row for row in results.read(RESULTS / f"{name}.json")["rows"]}


def test_the_table_of_a_step_on_zen_4() -> None:
    names = {
        "lora_engine": "ours",
        "TRL 1.16 `SFTTrainer` with PEFT": "trl-padded",
        "the same with `padding_free=True`": "trl-padding-free",
    }
    rows = rows_of("train_step-bfloat16-epyc-2cores")
    for what, name in names.items():
        row = rows[name]
        shares = f"{row['rate']:.0f} | {row['share_of_ceiling']:.0%}".replace("%", " %")
        assert f"| {what} | {shares} | {row['peak_bytes'] / GIB:.2f} GiB |" in README


def ahead(name: str, peer: str) -> tuple[str, str]:
    """How many times faster, and in what share of the memory."""
    compared = rows_of(name)[peer]["compared"]
    return f"{compared['times_as_long']['median']:.1f}", f"{compared['our_share_of_memory']:.2f}"


def test_the_claim_on_zen_4() -> None:
    name = "train_step-bfloat16-epyc-2cores"
    padded, memory = ahead(name, "trl-padded")
    free, less = ahead(name, "trl-padding-free")
    assert f"That is {padded} times TRL's speed in {memory} of its memory, and {free}" in README
    assert f"and {free} times in {less} against TRL without padding" in README
    name = "train_step-float32-epyc-2cores"
    padded, free = (ahead(name, peer)[0] for peer in ("trl-padded", "trl-padding-free"))
    assert f"in float32 {padded} and {free} times." in README


def test_the_claim_on_a_xeon_with_amx() -> None:
    name, said = "bench_train-xeon-2cores", []
    for peer in ("trl-padded", "trl-padding-free"):
        times = rows_of(name)[peer]["compared"]["times_as_long"]
        said.append(f"({times['lowest']:.1f} to {times['highest']:.1f})")
    (padded, memory), (free, less) = (ahead(name, x) for x in ("trl-padded", "trl-padding-free"))
    assert f"it is {padded} times {said[0]} and, without padding, {free} times {said[1]}" in README
    assert f"{said[1]}, in {memory} and {less} of the memory" in README
    name = "bench_train-xeon-2cores-compile"
    compiled = rows_of(name)["trl-padding-free-compile"]["compared"]["times_as_long"]
    assert f"(one of them compiled for minutes), {compiled['median']:.1f} times" in README
    unsloth, memory = ahead("bench_train-xeon-2cores-unsloth", "unsloth")
    assert f"of Unsloth's mode for a CPU, {unsloth} times in {memory} " in README


@pytest.mark.parametrize(
    ("what", "model", "method", "peer"),
    [
        ("8B LoRA, 4 × 2048 tokens", "llama-8b", "lora", "peft"),
        ("8B QLoRA (NF4)", "llama-8b", "qlora", "bitsandbytes"),
        ("1B LoRA, 12 sequences", "llama-1b", "lora", "peft-packed"),
    ],
)
def test_the_steps_on_an_h200(what: str, model: str, method: str, peer: str) -> None:
    lines = journal.read(RESULTS / "h200" / "train_step.jsonl")
    assert json.loads((RESULTS / "h200" / "environment.json").read_text())["commit"]
    found = {
        x["item"]["contender"]: x
        for x in lines
        if x["event"] == "row" and (x["item"]["model"], x["item"]["method"]) == (model, method)
    }
    ours, theirs = found["ours"], found[peer]
    unit = " tokens/s" if method == "lora" and model == "llama-8b" else ""
    speeds = f"{ours['tokens_per_second']:,.0f}{unit} | {theirs['tokens_per_second']:,.0f}"
    times = ours["tokens_per_second"] / theirs["tokens_per_second"]
    memory = f"{ours['peak_bytes'] / GIB:.1f} GiB, {theirs['peak_bytes'] / GIB:.1f}"
    line = README.partition(f"| {what}")[2].partition(" |")[2]
    assert line.startswith(f" {speeds} | {times:.2f} times | {memory} |")
