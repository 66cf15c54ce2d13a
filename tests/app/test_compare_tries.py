"""`lora-engine compare`: what it prints and writes, and what it refuses."""

import copy
import datetime
import io
import json
import math
import shutil

import yaml
from tries import MISTAKE, Try, check, run, tries

from lora_engine.app.compare import as_json, compare, render
from lora_engine.app.terminal import SafeConsole
from lora_engine.errors import UserError
from lora_engine.report.compare import _Summary, comparison_page


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


ODD = ([], {}, "x", None, True, -0.5, [{}], math.nan)


def places(value, path=()):
    """Paths of all that is inside of a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in inside:
        yield (*path, key)
        if isinstance(part, dict | list):
            yield from places(part, (*path, key))


def with_another(value, path, part):
    changed = copy.deepcopy(value)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = part
    return changed


def is_shown_or_refused():
    """Whether the runs are compared; else the refusal is a mistake of the user's, in one line."""
    try:
        compared = compare(["run", "other"], None)
    except UserError as error:
        assert str(error).startswith("other/") and "\n" not in str(error)
        return False
    page = comparison_page(compared.runs)
    assert "NaN" not in json.dumps(as_json(compared.runs)) and page.startswith("<!doctype")
    SafeConsole(file=io.StringIO()).print(render(compared))
    return True


def test_whatever_stands_in_a_file_is_shown_or_refused(finished):
    shutil.copytree("run", "other")
    other = finished / "other"
    summary, config = (
        read((other / name).read_text())
        for name, read in (("summary.json", json.loads), ("config.yaml", yaml.safe_load))
    )
    shown = []
    for path in places({key: summary.get(key) for key in _Summary.model_fields}):
        for odd in ODD:
            (other / "summary.json").write_text(json.dumps(with_another(summary, path, odd)))
            shown.append(is_shown_or_refused())
    for odd in ODD:
        (other / "summary.json").write_text(json.dumps(odd))
        shown.append(is_shown_or_refused())
    (other / "summary.json").write_text(json.dumps(summary))
    for path in (("model",), ("model", "path"), ("data",), ("data", "train"), ("objective",)):
        for odd in (*ODD, datetime.date(2026, 1, 1)):
            (other / "config.yaml").write_text(yaml.safe_dump(with_another(config, path, odd)))
            shown.append(is_shown_or_refused())
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    lines = (other / "metrics.jsonl").read_text().splitlines()
    for odd in ODD:
        for line in (json.dumps(odd), json.dumps({**json.loads(lines[1]), "loss": odd}),
                     json.dumps({**json.loads(lines[1]), "step": odd}), "{"):  # fmt: skip
            text = "\n".join([lines[0], line, *lines[2:]]) + "\n"
            (other / "metrics.jsonl").write_text(text)
            shown.append(is_shown_or_refused())
    assert 0.2 < sum(shown) / len(shown) < 0.8
    (other / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 3, "lo')
    assert is_shown_or_refused()


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
