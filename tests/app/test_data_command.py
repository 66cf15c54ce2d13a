"""`lora-engine data`: for people, as JSON, as a page, and as a check that can fail."""

import json

import pytest

from lora_engine.app.cli import main

CONFIG = """
model: {path: tiny}
data: {train: rows.jsonl, eval_fraction: 0.2}
"""


@pytest.fixture
def folder(saved_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(saved_model)
    (tmp_path / "run.yaml").write_text(CONFIG)
    write(tmp_path, [{"prompt": f"{i}:", "completion": f"{i}"} for i in range(20)])
    return tmp_path


def write(folder, rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["data", "run.yaml", *arguments])
    return ended.value.code


def test_data_that_are_fine_pass(folder, capfd):
    assert run("--strict") == 0
    shown = capfd.readouterr().out
    assert "prompt-completion (16)" in shown and "learned from" in shown


def test_json_says_the_same(folder, capfd):
    assert run("--json") == 0
    train, heldout = json.loads(capfd.readouterr().out)
    assert (train["num_records"], heldout["num_records"]) == (16, 4)
    assert train["formats"] == [["prompt-completion", 16]] and train["wrong"] == []
    assert any(learned for _, learned in train["samples"][0]["tokens"])


def test_strict_fails_where_something_should_be_mended(folder, capfd):
    rows = [{"prompt": f"{i}:", "completion": f"{i}"} for i in range(20)]
    write(folder, [*rows, *rows[:3], {"prompt": "x", "completion": ""}])
    assert run("--strict", "--json") == 1
    told = capfd.readouterr()
    assert json.loads(told.out)  # still whole
    assert "records are dropped" in told.err + told.out
    assert "examples repeat an earlier one" in told.err
    assert run() == 0


def test_a_page_is_written(folder, capfd):
    assert run("--html", "page.html") == 0
    page = (folder / "page.html").read_text()
    assert "rows.jsonl" in page and 'class="learned"' in page
    assert run("--html", "") == 2
    assert "--html: is empty" in capfd.readouterr().err
