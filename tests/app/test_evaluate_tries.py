"""`lora-engine evaluate`: base beside adapter, by group, with metrics."""

import json

import pytest
from tries import Try, check, run, tries

ROWS = "".join(
    json.dumps({"prompt": f"say {i}", "completion": f"it is {i}", "kind": "ab"[i % 2]}) + "\n"
    for i in range(8)
)


def test_a_run_s_base_beside_its_adapter(finished, capfd, monkeypatch):
    (finished / "held.jsonl").write_text(ROWS)
    (finished / "mine.py").write_text("def half(answers, references): return len(answers) / 2\n")
    monkeypatch.syspath_prepend(str(finished))
    status, printed, _ = run(
        capfd, "evaluate", "run", "--data", "held.jsonl", "--group", "kind", "--answers", "4",
        "--metric", "exact_match", "--metric", "mine:half", "--json",
    )  # fmt: skip
    assert status == 0
    report = json.loads(printed)
    base, adapter = report["base"], report["adapter"]
    assert base["examples"] == 8 and set(base["groups"]) == {"a", "b"}
    assert base["metrics"] == {"exact_match": 0.0, "mine:half": 2.0}
    assert adapter["loss"]["low"] < adapter["loss"]["value"] < adapter["loss"]["high"]
    change = report["difference"]
    assert change["value"] == pytest.approx(adapter["loss"]["value"] - base["loss"]["value"])
    assert change["low"] <= change["value"] <= change["high"] and change["value"] != 0
    # The run's own summary measured the same model on other rows: the losses are of one size.
    summary = json.loads((finished / "run/summary.json").read_text())
    assert base["loss"]["value"] == pytest.approx(summary["heldout_loss_before"], rel=0.1)
    status, printed, _ = run(
        capfd, "evaluate", "tiny", "--adapter", "run/adapter", "--data", "held.jsonl"
    )
    assert status == 0 and "with the adapter the loss is" in printed
    status, printed, _ = run(capfd, "evaluate", "tiny", "--data", "held.jsonl")
    assert status == 0 and "model: loss" in printed


MISTAKES = [
    Try("no data", ["evaluate", "tiny", "--data", "none.jsonl"], ["none.jsonl"]),
    Try("no model", ["evaluate", "tinny/", "--data", "rows.jsonl"], ["tinny"]),
    Try("no adapter", ["evaluate", "tiny", "--adapter", "none", "--data", "rows.jsonl"], ["none"]),
    Try("no column", ["evaluate", "tiny", "--data", "rows.jsonl", "--group", "promt"],
        ["promt", "did you mean prompt"]),
    Try("no metric", ["evaluate", "tiny", "--data", "rows.jsonl", "--metric", "blue"],
        ["blue", "did you mean bleu"]),
    Try("no function", ["evaluate", "tiny", "--data", "rows.jsonl", "--metric", "math:nothing"],
        ["math:nothing", "module:function"]),
]  # fmt: skip


@tries(MISTAKES)
def test_mistakes(finished, capfd, entry):
    check(capfd, finished, entry)
