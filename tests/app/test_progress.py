"""How a run shows on a console, plain and on a terminal."""

import io
import re

import pytest
from finetune_runs import run
from rich.console import Console

from lora_engine.app.progress import ConsoleProgress, render_outcome
from lora_engine.evaluation.heldout import HeldoutResult
from lora_engine.training.state import TrainState


def console_text(terminal):
    return Console(record=True, force_terminal=terminal, width=100, file=_Nowhere())


class _Nowhere:
    encoding = "utf-8"

    def write(self, text):
        return len(text)

    def flush(self):
        return None

    def isatty(self):
        return False


def test_plain_progress_is_lines_with_loss_and_speed(settings):
    console = console_text(terminal=False)
    outcome = run(observer=ConsoleProgress(console))
    console.print(render_outcome(outcome))
    text = console.export_text()
    for step in range(1, 5):
        [line] = [line for line in text.splitlines() if line.startswith(f"step {step}/4")]
        assert "loss " in line and "held-out " in line and "tokens/s" in line
        assert ("left" in line) == (step < 4)
    assert "step 0: held-out loss" in text
    assert "out/report.html" in text
    for name in ("before", "after", "reference"):
        assert text.count(f" {name} ") >= 3


def test_terminal_progress_is_a_bar_that_is_gone_after_an_error(settings):
    console = console_text(terminal=True)
    progress = ConsoleProgress(console)
    with pytest.raises(ZeroDivisionError):
        progress.on_start(type("T", (), {"total_steps": 4, "state": TrainState()}))
        try:
            _ = 1 / 0
        finally:
            progress.close()
    assert console._live_stack == []
    run(observer=ConsoleProgress(console))
    assert "4/4" in console.export_text()


def test_of_pairs_it_is_told_how_many_are_in_order():
    console = console_text(terminal=False)
    progress = ConsoleProgress(console)
    progress.on_eval(3, HeldoutResult(0.25, 0.5, 10, 10, {"rewards/accuracies": 0.875}))
    progress.on_eval(4, HeldoutResult(0.25, 0.5, 10, 10, {}))
    assert console.export_text().splitlines() == [
        "step 3: held-out loss 0.250, pair accuracy 87.5%",
        "step 4: held-out loss 0.250, token accuracy 50.0%",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_loading_is_a_bar_that_is_gone_at_its_end(terminal):
    console = console_text(terminal)
    progress = ConsoleProgress(console)
    progress.on_load(5, 10)
    assert len(console._live_stack) == terminal
    progress.on_load(10, 10)
    assert console._live_stack == []


def test_reading_is_a_bar_with_its_records_until_the_next_stage():
    console = console_text(terminal=True)
    progress = ConsoleProgress(console)
    progress.on_reading("a.jsonl", 50, 200, 1234)
    [bar] = console._live_stack
    [task] = progress._bar.tasks
    assert (task.completed, task.total) == (50, 200)
    assert "a.jsonl: 1,234 records" in task.fields["facts"]
    progress.on_reading("b.jsonl.gz", 70, 0, 9)  # how much there will be is not known
    [other] = progress._bar.tasks
    assert other.total is None and "b.jsonl.gz: 9 records" in other.fields["facts"]
    assert other.completed == 70
    assert console._live_stack != [bar] and len(console._live_stack) == 1
    progress.stage("training")
    assert console._live_stack == []


def test_the_bar_of_reading_says_how_far_how_fast_and_how_long(monkeypatch):
    clock = iter([0.0, *(float(i) for i in range(1000))])
    console = Console(
        force_terminal=True, width=100, file=io.StringIO(), get_time=lambda: next(clock)
    )
    progress = ConsoleProgress(console)
    for done in (10, 50, 90):
        progress.on_reading("a.jsonl", done * 10**6, 200 * 10**6, done)
    progress._bar.refresh()
    shown = console.file.getvalue()
    progress.close()
    assert "45%" in shown and "a.jsonl: 90 records" in shown and "MB/s" in shown
    assert re.search(r"\d\d:\d\d", shown)


def test_reading_without_a_terminal_is_a_line_now_and_then(monkeypatch):
    clock = iter([0.0, 1.0, 6.0, 7.0, 12.0])
    monkeypatch.setattr("lora_engine.app.progress.time.monotonic", lambda: next(clock))
    console = console_text(terminal=False)
    progress = ConsoleProgress(console)
    for done in (10, 50, 70, 100):
        progress.on_reading("a.jsonl", done * 10**6, 100 * 10**6, done)
    assert console.export_text().splitlines() == [
        "reading a.jsonl: 50 records (50%), 8.0 MB/s, 6.2 s left",
        "reading a.jsonl: 100 records (100%), 8.2 MB/s",
    ]
