"""`lora-engine compare`: what it prints and writes, and what it refuses."""

import json
import shutil

from tries import MISTAKE, Try, check, run, tries


def test_two_runs(finished, capfd):
    shutil.copytree("run", "other")
    config = finished / "other" / "config.yaml"
    config.write_text(config.read_text().replace("\n  r: 2\n", "\n  r: 64\n"))
    status, printed, _ = run(capfd, "compare", "run", "other")
    assert status == 0
    rows = {" ".join(line.split()) for line in printed.splitlines()}
    assert {"run other", "lora.r 2 64", "Steps 2 2", "compare.html"} <= rows
    assert "<h1>2 runs</h1>" in (finished / "compare.html").read_text()
    status, printed, _ = run(capfd, "compare", "run", "other", "--html", "page.html", "--json")
    assert status == 0 and json.loads(printed)["settings"] == {"lora.r": ["2", "64"]}
    assert (finished / "page.html").read_text() == (finished / "compare.html").read_text()
    (finished / "page.html").unlink()
    assert run(capfd, "compare", "run", "other", "--json")[0] == 0
    assert not (finished / "page.html").exists()


def test_many_runs_stand_below_each_other(finished, capfd):
    names = ["run", *(f"copy{number}" for number in range(6))]
    for name in names[1:]:
        shutil.copytree("run", name)
    status, printed, _ = run(capfd, "compare", *names)
    assert status == 0 and "no setting differs" in printed
    assert sum(line.startswith("Steps") for line in printed.splitlines()) == 2


MISTAKES = [
    Try("one run", ["compare", "run"], ["two runs or more"]),
    Try("no run", ["compare"], ["RUN"]),
    Try("no such folder", ["compare", "run", "nowhere"], ["nowhere: no such folder"]),
    Try("no run's folder", ["compare", "run", "tiny"], ["tiny: holds no run"]),
    Try("twice", ["compare", "run", "./run"], ["given twice"]),
    Try("an empty name", ["compare", "run", ""], ["is empty"]),
    Try("another's file", ["compare", "run", "run", "--html", "rows.jsonl"],
        ["rows.jsonl: holds something else"]),
    Try("a folder as the page", ["compare", "run", "run", "--html", "tiny"], ["is a folder"]),
    Try("broken settings", ["compare", "run", "run2"], ["config.yaml", "not YAML"],
        files={"run2/config.yaml": "a: [1"}),
    Try("settings that are none", ["compare", "run", "run2"], ["is no configuration"],
        files={"run2/config.yaml": "5"}),
    Try("broken summary", ["compare", "run", "run2"], ["summary.json"],
        files={"run2/config.yaml": "a: 1", "run2/summary.json": "{"}),
]  # fmt: skip


@tries(MISTAKES)
def test_mistakes(finished, capfd, entry):
    check(capfd, finished, entry)
    assert entry.status == MISTAKE and not (finished / "compare.html").exists()
