"""`lora-engine evaluate`: base beside adapter, by group, with metrics."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_model import save_tiny_model
from tries import MISTAKE, Try, check, run, tries

ROWS = "".join(
    json.dumps({"prompt": f"say {i}", "completion": f"it is {i}", "kind": "ab"[i % 2]}) + "\n"
    for i in range(8)
)


def test_a_run_s_base_beside_its_adapter(finished, capfd):
    (finished / "held.jsonl").write_text(ROWS)
    (finished / "mine.py").write_text("def half(answers, references): return len(answers) / 2\n")
    status, printed, _ = run(
        capfd, "evaluate", "run", "--data", "held.jsonl", "--group", "kind", "--answers", "4",
        "--metric", "exact_match", "--metric", "mine:half", "--json", "--html", "page.html",
    )  # fmt: skip
    assert status == 0
    report = json.loads(printed)
    assert [sample["reference"] for sample in report["samples"]] == [
        f"it is {i}" for i in range(0, 8, 2)
    ]
    page = (finished / "page.html").read_text()
    assert "mine:half" in page and "it is 2" in page
    base, adapter = report["base"], report["adapter"]
    assert base["examples"] == 8 and set(base["groups"]) == {"a", "b"}
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0}
    assert base["metrics"] == {"exact_match": nothing, "mine:half": {"value": 2.0}}
    assert base["groups"]["a"]["metrics"] == {"exact_match": nothing, "mine:half": {"value": 2.0}}
    assert "metrics" not in base["groups"]["b"], "the four prompts are all of the other"
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


def test_a_run_is_measured_on_what_it_held_out(finished, capfd):
    status, printed, _ = run(capfd, "evaluate", "run", "--json", "--metric", "f1")
    assert status == 0
    report = json.loads(printed)
    summary = json.loads((finished / "run/summary.json").read_text())
    assert report["data"] == "rows.jsonl, held out"
    for side, when in (("base", "before"), ("adapter", "after")):
        loss = report[side]["loss"]["value"]
        assert loss == pytest.approx(summary[f"heldout_loss_{when}"], rel=1e-3)
    assert report["base"]["answers"] == report["base"]["examples"] > 0


CHOICES = "".join(
    json.dumps({"prompt": f"say {i}", "choices": [f"it is {i}", "qqq"], "answer": 0, "k": i % 2})
    + "\n"
    for i in range(6)
)


def test_questions_with_choices(finished, capfd):
    (finished / "asked.jsonl").write_text(CHOICES)
    call = ("evaluate", "run", "--data", "asked.jsonl", "--choices", "--group", "k")
    status, printed, _ = run(capfd, *call, "--json")
    assert status == 0
    report = json.loads(printed)
    for side in ("base", "adapter"):
        assert report[side]["questions"] == 6 and report[side]["groups"]["0"]["questions"] == 3
        assert 0 <= report[side]["accuracy"]["low"] <= report[side]["accuracy"]["high"] <= 1
    change = report["adapter"]["accuracy"]["value"] - report["base"]["accuracy"]["value"]
    assert report["difference"]["value"] == pytest.approx(change)
    status, printed, _ = run(capfd, *call)
    assert status == 0 and "6 questions" in printed and "the accuracy is" in printed


def test_a_run_is_measured_with_its_own_chat_template(finished, capfd):
    """That of the base may be another, or missing."""
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    (finished / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (finished / "tiny" / "chat_template.jinja").unlink()
    status, _, told = run(capfd, "evaluate", "tiny", "--data", "held.jsonl")
    assert status == MISTAKE and "no chat template" in told
    assert run(capfd, "evaluate", "run", "--data", "held.jsonl")[0] == 0


def test_other_data_are_read_as_the_run_read_its_own(finished, capfd):
    """With its columns and its masks; beside an adapter alone they are recognised."""
    rows = [{"asked": f"say {i}", "said": f"it is {i}"} for i in range(9)]
    (finished / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (finished / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    changes = ("data.columns={prompt: asked, completion: said}", "train.output_dir=own")
    lengths = []
    for loss_on in ("completion", "all"):
        how = (*changes, f"data.loss_on={loss_on}")
        shutil.rmtree("own", ignore_errors=True)
        assert run(capfd, "train", "run.yaml", *how)[0] == 0
        status, printed, told = run(capfd, "evaluate", "own", "--data", "more.jsonl", "--json")
        assert status == 0, told
        report = json.loads(printed)
        assert "as the run learned" in report["measured"]
        lengths.append(report["adapter"]["targets"])
    assert lengths[0] == 4 * len("it is 0 ")  # and the end token
    assert lengths[1] - lengths[0] == 4 * len("say 0") - 4  # nothing comes before the first token
    status, printed, _ = run(capfd, "evaluate", "own", "--data", "more.jsonl", "--html", "p.html")
    assert status == 0 and "more.jsonl: measured on all tokens, as the run learned" in printed
    assert "measured on all tokens, as the run learned" in (finished / "p.html").read_text()
    alone = ("evaluate", "tiny", "--adapter", "own/adapter", "--data", "more.jsonl")
    assert run(capfd, *alone)[0] == MISTAKE


def test_a_whole_model_is_measured_on_what_its_run_held_out(finished, capfd):
    changes = ("lora=null", "train.output_dir=whole", "train.learning_rate=0.001")
    assert run(capfd, "train", "run.yaml", *changes)[0] == 0
    status, printed, told = run(capfd, "evaluate", "whole", "--json")
    assert status == 0, told
    report = json.loads(printed)
    summary = json.loads((finished / "whole/summary.json").read_text())
    loss = report["model"]["loss"]["value"]
    assert loss == pytest.approx(summary["heldout_loss_after"], rel=1e-3)
    assert "difference" not in report


def test_a_base_that_was_moved_is_given_anew(finished, capfd):
    (finished / "tiny").rename(finished / "elsewhere")
    status, _, told = run(capfd, "evaluate", "run")
    assert status == MISTAKE and "the base of run/adapter: " in told and "with --base" in told
    assert run(capfd, "evaluate", "run", "--base", "elsewhere")[0] == 0
    status, _, told = run(capfd, "evaluate", "elsewhere", "--adapter", "run", "--base", "a")
    assert status == MISTAKE and "--base a: --adapter has elsewhere as its base" in told


def test_records_that_are_left_out_are_told(finished, capfd):
    rows = '{"prompt": "a", "completion": ""}\n{"prompt": "a", "completion": "b"}\n'
    (finished / "held.jsonl").write_text(rows)
    call = ("evaluate", "tiny", "--data", "held.jsonl")
    status, printed, _ = run(capfd, *call, "--html", "page.html")
    assert status == 0 and "held.jsonl:1" in printed.split("model:")[0]
    assert "held.jsonl:1" in (finished / "page.html").read_text()
    (finding,) = json.loads(run(capfd, *call, "--json")[1])["findings"]
    assert finding["count"] == 1 and finding["origins"] == ["held.jsonl:1"]


def test_json_is_for_programs_whatever_the_terminal_shows(finished, capfd, monkeypatch):
    rows = '{"prompt": "a", "completion": "b", "kind": "caf\u00e9"}\n'
    (finished / "held.jsonl").write_text(rows, encoding="utf-8")
    call = ("evaluate", "tiny", "--data", "held.jsonl", "--group", "kind", "--json")
    printed = run(capfd, *call)[1]
    assert printed.isascii() and set(json.loads(printed)["model"]["groups"]) == {"caf\u00e9"}


def spoil(folder: Path) -> None:
    """A model whose second layer's output is not finite."""
    path = folder / "tiny/model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})


def two_adapters(folder: Path) -> None:
    for name in "ab":
        shutil.copytree(folder / "run/adapter", folder / "both" / name)


def other_base(folder: Path) -> None:
    shutil.rmtree(folder / "tiny")
    save_tiny_model(folder / "tiny", seed=1)


def of_a_reward_model(folder: Path) -> None:
    """As PEFT has it of one without a head of its own, which any model would load."""
    path = folder / "run/adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task_type": "SEQ_CLS"}))


PAIR = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
JUDGED = '{"prompt": "a", "completion": "b", "label": true}\n'
MISTAKES = [
    Try("a reward model", ["evaluate", "run", "--data", "rows.jsonl"],
        ["run/adapter: its task_type is SEQ_CLS, a model that writes no text"],
        prepare=of_a_reward_model),
    Try("pairs", ["evaluate", "tiny", "--data", "pairs.jsonl"],
        ["pairs.jsonl:1: is a record of preferences", "give --data"],
        files={"pairs.jsonl": PAIR * 2}),
    Try("judged answers", ["evaluate", "tiny", "--data", "judged.jsonl"],
        ["judged.jsonl:1: is a record of preferences"], files={"judged.jsonl": JUDGED * 2}),
    Try("no choices", ["evaluate", "tiny", "--data", "rows.jsonl", "--choices"],
        ["'choices' must be a list"]),
    Try("choices of what has none", ["evaluate", "tiny", "--data", "docstrings", "--choices"],
        ["docstrings: holds no questions with choices"]),
    Try("a column of what has none",
        ["evaluate", "tiny", "--data", "docstrings", "--limit", "2", "--group", "kind"],
        ["--group kind", "it has none"]),
    Try("a page where none can be",
        ["evaluate", "tiny", "--data", "rows.jsonl", "--html", "rows.jsonl/page.html"],
        ["rows.jsonl/page.html", "in the way"], status=1),
    Try("choices and a metric",
        ["evaluate", "tiny", "--data", "rows.jsonl", "--choices", "--metric", "f1"],
        ["--metric f1"]),
    Try("no data", ["evaluate", "tiny", "--data", "none.jsonl"], ["none.jsonl"]),
    Try("data of no run", ["evaluate", "tiny"],
        ["tiny, which is no run's folder, needs", "--data"]),
    Try("a run's name misspelled", ["evaluate", "rum"],
        ["rum, which is no run's folder", "--data"]),
    Try("a group of what was held out", ["evaluate", "run", "--group", "kind"],
        ["--group needs", "--data"]),
    Try("a column that no row has", ["evaluate", "tiny", "--data", "rows.jsonl", "--group", ""],
        ["--group", "there is"]),
    Try("a metric that fails",
        ["evaluate", "tiny", "--data", "rows.jsonl", "--metric", "broken.py:metric"],
        ["--metric broken.py:metric: ValueError: odd"],
        {"broken.py": "def metric(answers, references): raise ValueError('odd')\n"}),
    Try("a metric that gives no number",
        ["evaluate", "tiny", "--data", "rows.jsonl", "--metric", "broken.py:metric"],
        ["--metric broken.py:metric: gave 'good'"],
        {"broken.py": "def metric(answers, references): return 'good'\n"}),
    Try("no model", ["evaluate", "tinny/", "--data", "rows.jsonl"], ["tinny"]),
    Try("no adapter", ["evaluate", "tiny", "--adapter", "none", "--data", "rows.jsonl"], ["none"]),
    Try("no column", ["evaluate", "tiny", "--data", "rows.jsonl", "--group", "promt"],
        ["promt", "did you mean prompt"]),
    Try("no metric", ["evaluate", "tiny", "--data", "rows.jsonl", "--metric", "blue"],
        ["blue", "did you mean bleu"]),
    Try("another's file as page",
        ["evaluate", "tiny", "--data", "rows.jsonl", "--html", "rows.jsonl"],
        ["rows.jsonl: holds something else"]),
    Try("a model that is not finite", ["evaluate", "tiny", "--data", "rows.jsonl"],
        ["the loss is nan", "first bad layer model.layers.1.mlp.down_proj", "rows.jsonl:1"],
        prepare=spoil),
    Try("choices of a model that is not finite",
        ["evaluate", "tiny", "--data", "asked.jsonl", "--choices"],
        ["the loss is nan", "asked.jsonl:1"], {"asked.jsonl": CHOICES}, spoil),
    Try("several adapters", ["evaluate", "both", "--data", "rows.jsonl"],
        ["both: holds several adapters", "give", "--adapter with one of both/a, both/b"],
        prepare=two_adapters),
    Try("a whole model as adapter",
        ["evaluate", "tiny", "--adapter", "tiny", "--data", "rows.jsonl"],
        ["--adapter tiny: is a whole model"]),
    Try("another base", ["evaluate", "run"], ["tiny: is not the base"], prepare=other_base),
    Try("no answers for a metric",
        ["evaluate", "tiny", "--data", "texts.jsonl", "--metric", "f1"],
        ["--metric f1: texts.jsonl has no prompt with an answer"],
        {"texts.jsonl": '{"text": "a"}\n'}),
    Try("a metric that ends the program",
        ["evaluate", "tiny", "--data", "rows.jsonl", "--metric", "broken.py:metric"],
        ["--metric broken.py:metric: SystemExit"],
        {"broken.py": "def metric(answers, references): raise SystemExit(0)\n"}),
    Try("a module that ends the program",
        ["evaluate", "tiny", "--data", "rows.jsonl", "--metric", "broken.py:metric"],
        ["--metric broken.py:metric: the module cannot be imported (SystemExit"],
        {"broken.py": "raise SystemExit(0)\n"}),
    Try("no function", ["evaluate", "tiny", "--data", "rows.jsonl", "--metric", "math:nothing"],
        ["--metric math:nothing", "no function 'nothing'"]),
]  # fmt: skip


@tries(MISTAKES)
def test_mistakes(finished, capfd, entry):
    check(capfd, finished, entry)
