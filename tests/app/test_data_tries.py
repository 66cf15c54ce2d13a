"""Data and chat templates that nothing can be learned from."""

import json
import os
from pathlib import Path

import pytest
from tries import RECORDS, Try, check, tries

GOOD = '{"prompt": "a", "completion": "b"}\n'
DEEP = "[" * 100_000


def data(name: str, content: str | bytes, *words: str, file="bad.jsonl", listed=False) -> Try:
    """A data file that cannot be used."""
    arguments = ["train", "run.yaml", f"data.train={file}"]
    return Try(name, arguments, [file, *words], {file: content}, listed=listed)


def record(name: str, line: str, *words: str) -> Try:
    """One bad record among good ones, in line 2."""
    return data(name, GOOD + line + "\n" + GOOD, "bad.jsonl:2", *words, listed=True)


def source(name: str, given: str, *words: str, prepare=lambda folder: None, status=2) -> Try:
    return Try(name, ["train", "run.yaml", f"data.train={given}"], words, {}, prepare, status)


def chat(number: int) -> str:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b {number}"}]
    return json.dumps({"messages": messages}) + "\n"


def template(name: str, text: str, *words: str) -> Try:
    """A chat template that cannot render."""

    def prepare(folder: Path) -> None:
        for path in folder.glob("tiny/chat_template*"):
            path.unlink()
        path = folder / "tiny/tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": text}))
        (folder / "rows.jsonl").write_text("".join(map(chat, range(12))))

    return Try(name, ["train", "run.yaml"], ["rows.jsonl", *words], {}, prepare, listed=True)


FILES = [
    source("no file", "gone.jsonl", "gone.jsonl", "no such file"),
    source("near file", "row.jsonl", "row.jsonl", "did you mean rows.jsonl"),
    source("folder of no data", "tiny", "tiny", "JSON list"),
    source("another kind", "run.yaml", "run.yaml", ".jsonl"),
    source("below a file", "rows.jsonl/a.jsonl", "rows.jsonl/a.jsonl"),
    source("near built-in", "docstring", "docstring", "did you mean docstrings"),
    source("split of docstrings", "docstrings", "data.split", prepare=lambda f: None),
    data("empty", "", "no records"),
    data("blank", "\n \n", "no records"),
    data("one record", GOOD, "bad.jsonl"),
    data("UTF-16", b"\xff\xfe\n", "UTF-8"),
    data("not UTF-8", b"{\xff\xfe}\n", ":1", "UTF-8"),
    data("random bytes", bytes(range(256)) * 4, ":1", listed=True),
    data("no list", '{"a": 1}', ":1", "list", file="bad.json"),
    data("open list", "[" + GOOD, ":", file="bad.json", listed=True),
    data("deep list", DEEP, file="bad.json", listed=True),
    data("deep record", "[" + '{"a":' * 50_000, file="bad.json", listed=True),
    data("empty list", "[]", "no records", file="bad.json"),
    data("empty table", "", file="bad.csv"),
    data("header only", "prompt,completion\n", "no records", file="bad.csv"),
    data("open quote", 'prompt,completion\n"a,b\n', "bad.csv", file="bad.csv", listed=True),
    data("more cells", "prompt,completion\na,b,c\n", "bad.csv:2", file="bad.csv", listed=True),
    data("one row", "prompt,completion\na,b\n", "hold out", file="bad.csv"),
    data("NUL in a row", "prompt,completion\na\0,b\n", "bad.csv:2", "NUL", file="bad.csv"),
    data("no such columns", "text1,text2\na,b\n", "bad.csv:2", file="bad.csv", listed=True),
    data("no Parquet", "PAR1 and nothing", "Parquet", file="bad.parquet"),
    data("empty Parquet", "", "Parquet", file="bad.parquet"),
    record("no JSON", "{oops", "JSON"),
    record("two values", "{} {}", "JSON"),
    record("deep JSON", DEEP),
    record("deep objects", '{"a":' * 50_000),
    record("giant integer", '{"prompt": ' + "9" * 5000 + ', "completion": "b"}'),
    record("NaN", '{"prompt": NaN, "completion": "b"}', "prompt"),
    record("list", "[1, 2]"),
    record("text", '"text"'),
    record("number", "12"),
    record("null", "null"),
    record("no known field", '{"txt": "a"}', "txt"),
    record("half a pair", '{"prompt": "a"}'),
    record("number for text", '{"text": 12}', "text"),
    record("list for text", '{"text": ["a"]}', "text"),
    record("no messages", '{"messages": []}', "messages"),
    record("messages a text", '{"messages": "a"}', "messages"),
    record("message a text", '{"messages": ["a"]}', "message 1"),
    record("no role", '{"messages": [{"content": "a"}]}', "role"),
    record("content a number", '{"messages": [{"role": "user", "content": 1}]}', "content"),
    record("lone surrogate", '{"prompt": "a\\ud800", "completion": "b"}', "surrogate"),
]

TEMPLATES = [
    template("no syntax", "{% for %}"),
    template("undefined", "{{ nothing.at.all }}"),
    template("raises", "{{ raise_exception('only users') }}", "only users"),
    template("overflows", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
    template("divides by zero", "{{ 1 // 0 }}"),
    template("unsafe", "{{ ''.__class__.__mro__ }}"),
    template("writes nothing", ""),
]


@tries(FILES)
def test_data(capfd, run_folder, entry):
    if entry.name == "split of docstrings":
        entry = Try("", [*entry.arguments, "data.split=test"], ["docstrings", "test"])
    check(capfd, run_folder, entry)


@tries(TEMPLATES)
def test_templates(capfd, run_folder, entry):
    check(capfd, run_folder, entry)


def test_many_bad_lines_are_a_count_and_examples(capfd, run_folder):
    entry = data("", "{oops\n" * 400, "400", listed=True)
    assert check(capfd, run_folder, entry).count("\n") < 30


@pytest.mark.parametrize("command", ["train", "data"])
def test_data_that_cannot_be_read(capfd, run_folder, command):
    (run_folder / "loop.jsonl").symlink_to("loop.jsonl")
    entry = Try("", [command, "run.yaml", "data.train=loop.jsonl"], ["loop.jsonl"])
    check(capfd, run_folder, entry)


def test_a_pipe_that_nobody_writes_to(capfd, run_folder):
    os.mkfifo(run_folder / "pipe.jsonl")
    check(capfd, run_folder, source("", "pipe.jsonl", "pipe.jsonl"))


def test_held_out_data_of_their_own(capfd, run_folder):
    (run_folder / "run.yaml").write_text(
        (run_folder / "run.yaml").read_text().replace("eval_fraction: 0.2", "eval: held.jsonl")
    )
    (run_folder / "held.jsonl").write_text(RECORDS + "{oops\n")
    check(capfd, run_folder, Try("", ["data", "run.yaml"], ["held.jsonl:13"], listed=True))
