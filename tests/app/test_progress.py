"""How a run shows on a console, plain and on a terminal."""

import pytest
from finetune_runs import run
from rich.console import Console

from lora_engine.app.progress import ConsoleProgress, render_outcome


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
        progress.on_start(type("T", (), {"total_steps": 4, "state": type("S", (), {"step": 0})}))
        try:
            _ = 1 / 0
        finally:
            progress.close()
    assert console._live_stack == []
    run(observer=ConsoleProgress(console))
    assert "4/4" in console.export_text()


@pytest.mark.parametrize("terminal", [False, True])
def test_loading_is_a_bar_that_is_gone_at_its_end(terminal):
    console = console_text(terminal)
    progress = ConsoleProgress(console)
    progress.on_load(5, 10)
    assert len(console._live_stack) == terminal
    progress.on_load(10, 10)
    assert console._live_stack == []
