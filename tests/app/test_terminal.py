"""Output that no terminal, pipe or text can break."""

import errno
import io
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from tiny_model import save_tiny_model

from lora_engine import backends
from lora_engine.app import cli
from lora_engine.app.terminal import Output, SafeConsole, degrade, shown_warnings
from lora_engine.errors import EngineWarning
from lora_engine.text import one_line, visible

CONFIG = """\
model: {path: tiny, dtype: float32, device: cpu}
data: {train: rows.jsonl, eval_fraction: 0.2}
lora: {r: 2}
train: {output_dir: "runs/[/red] [bold]\u202e", max_steps: 2, tokens_per_batch: 64}
samples: {count: 1, max_new_tokens: 2}
evaluation: {probe: null}
"""
MARKUP = "[/red][bold]a[/]"


class Stream(io.TextIOWrapper):
    """A standard output of an encoding; what was written is in .text."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)

    @property
    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


class Broken(io.StringIO):
    """A standard output that takes `room` characters, and then no more."""

    def __init__(self, room: int, error: int) -> None:
        super().__init__()
        self.room, self.error = room, error

    def write(self, text: str) -> int:
        self.room -= len(text)
        if self.room < 0:
            raise OSError(self.error, os.strerror(self.error))
        return super().write(text)


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """The working folder, with a configuration whose names are hard to print."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(Path("tiny"))
    rows = [{"prompt": f"{MARKUP} \x1b[31m{i}", "completion": f"é → {i}"} for i in range(12)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("run.yaml").write_text(CONFIG, encoding="utf-8")
    return tmp_path


def run(*arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return caught.value.code


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é → 漢", "plain é → 漢"),
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x00\x07\x7f\x9b", r"\x00\x07\x7f\x9b"),
        ("a\u202eb\u2066c\u200f", r"a\u202eb\u2066c\u200f"),
        ("a\u2028b", r"a\u2028b"),
    ],
)
def test_visible(text, shown):
    assert visible(text) == shown


def test_one_line_keeps_the_breaks_of_a_list():
    assert one_line("a\nb: two:\n  one\n  two") == r"a\nb: two:" + "\n  one\n  two"


@pytest.mark.parametrize("wrap", [str, Text, Panel, lambda text: _table(text)])
def test_console_shows_text_as_it_is(wrap):
    stream = Stream("utf-8")
    console = SafeConsole(file=stream, width=100)
    console.print(wrap(f"{MARKUP} :smile: \x1b[31m\u202e"))
    assert rf"{MARKUP} :smile: \x1b[31m\u202e" in stream.text


def _table(text):
    table = Table()
    table.add_column(text)
    table.add_row(text)
    return table


def test_console_still_colours_a_terminal():
    stream = Stream("utf-8")
    SafeConsole(file=stream, force_terminal=True, color_system="standard").print(Text("a", "red"))
    assert stream.text == "\x1b[31ma\x1b[0m\n"


def test_ascii_has_a_likeness_of_every_sign():
    stream = Stream("ascii")
    degrade(stream)
    stream.write("… · → × ≥ ✓ ✗ − é \udc80")
    assert stream.text == r"... - -> x >= + x - \xe9 \udc80"


def test_output_outlives_its_reader():
    output = Output(Broken(5, errno.EPIPE))
    assert output.write("12345") == 5
    assert output.failure is None
    assert output.write("6") == 1
    assert output.failure is not None and output.failure.errno == errno.EPIPE
    output.flush()


def test_the_projects_warnings_are_a_line_each_and_libraries_silent(capsys):
    with shown_warnings():
        for _ in range(2):
            warnings.warn("it\nruns \x1b[31mslowly", EngineWarning, stacklevel=1)
        warnings.warn("a library's", UserWarning, stacklevel=1)
        logging.getLogger("lora_engine.a").warning("%s: two\n  listed", "b\x07")
    assert capsys.readouterr().err.splitlines() == [
        r"lora-engine: warning: it\nruns \x1b[31mslowly",
        r"lora-engine: warning: b\x07: two",
        "  listed",
    ]
    with pytest.warns(UserWarning, match="heard again"):
        warnings.warn("heard again", UserWarning, stacklevel=1)


def test_a_run_says_what_runs_as_the_reference(run_folder, capsys):
    backends.selection._warn_once.cache_clear()
    settings = ["model.dtype=float16", "train.max_steps=1", "samples.count=0"]
    assert run("train", "run.yaml", *settings) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "rms_norm" in line]
    assert len(told) == 1
    start = "lora-engine: warning: lora_engine.rms_norm runs as the PyTorch reference: "
    assert told[0].startswith(start) and "float16" in told[0]


@pytest.mark.parametrize("command", ["--help", "doctor", "data", "train"])
def test_an_ascii_terminal(run_folder, monkeypatch, command):
    stream = Stream("ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    status = run(command, *(["run.yaml"] if command in ("data", "train") else []))
    assert status == 0
    assert stream.text.isascii()
    assert len(stream.text.splitlines()) > 5


def test_an_error_on_an_ascii_terminal(run_folder, monkeypatch):
    stream = Stream("ascii")
    monkeypatch.setattr(sys, "stderr", stream)
    assert run("train", "run.yaml", "samples.count=-1") == 2
    assert "samples.count" in stream.text
    assert run("train", "é.yaml") == 2
    assert r"\xe9.yaml" in stream.text


def test_names_with_brackets_do_not_garble_a_run(run_folder, capsys):
    assert run("train", "run.yaml") == 0
    folder = "runs/[/red] [bold]\u202e"
    printed, shown = capsys.readouterr().out, visible(folder)
    assert f"report   {shown}/report.html" in " ".join(printed.split("\n"))
    assert MARKUP in printed
    assert "\x1b" not in printed
    page = Path(folder, "report.html").read_text(encoding="utf-8")
    assert "[/red] [bold]" in page


def test_markup_in_data_does_not_become_part_of_the_report(run_folder):
    rows = [{"prompt": f"<script>alert({i})</script>", "completion": "</pre>"} for i in range(12)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("train", "run.yaml", "train.output_dir=<b>") == 0
    page = Path("<b>/report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert "<td>&lt;b&gt;</td>" in page


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (errno.EPIPE, "standard output: its reader has gone; "),
        (errno.ENOSPC, "standard output: the disk is full; free some space"),
        (errno.EIO, "standard output: the disk failed to read or write; "),
    ],
)
def test_a_run_goes_on_without_its_output(run_folder, monkeypatch, capsys, error, line):
    monkeypatch.setattr(sys, "stdout", Broken(30, error))
    monkeypatch.setattr(cli, "_give_up_standard_output", lambda: None)
    assert run("train", "run.yaml", "train.output_dir=run") == 1
    assert capsys.readouterr().err.startswith(f"lora-engine: {line}")
    assert json.loads(Path("run/summary.json").read_text())["steps"] == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("redirection", "words"),
    [(">/dev/full", "the disk is full"), (">&-", "is closed"), ("| true", "its reader has gone")],
)
def test_a_process_without_standard_output(redirection, words):
    program = f'"{sys.executable}" -c "from lora_engine.app.cli import main; main()"'
    script = f"set -o pipefail; {program} --help {redirection}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_a_process_without_standard_error():
    program = (
        f'"{sys.executable}" -c "from lora_engine.app.cli import main; main()" train gone.yaml'
    )
    done = subprocess.run(["bash", "-c", f"{program} 2>&-"], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")
