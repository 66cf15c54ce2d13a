"""How a run shows on the console: a live bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from lora_engine.app.finetune import Outcome
from lora_engine.evaluation.heldout import HeldoutResult, ProbeResult
from lora_engine.evaluation.samples import differing_parts
from lora_engine.report.page import comparisons
from lora_engine.text import bytes_text, duration_text, visible
from lora_engine.training.callbacks import Beginning
from lora_engine.training.metrics import StepMetrics
from lora_engine.training.run.folder import RunFolder
from lora_engine.training.state import TrainResult

PLAIN_LINES = 20
REMEMBER = 0.9
SHOWN_LINES = 8
READING_SECONDS = 5.0


class ConsoleProgress:
    """Shows a run's stages and steps; pass it to `finetune` as the observer."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._total = 0
        self._first = 0
        self._loss = 0.0
        self._heldout = self._reward = ""
        self._probe: ProbeResult | None = None
        self._tokens = 0
        self._seconds = 0.0
        self._started = 0.0
        self._reading = ""
        self._reading_began = (0.0, 0)  # when, and how many bytes were read then
        self._told_reading = time.monotonic()

    def stage(self, text: str) -> None:
        """A line about what begins now."""
        self.close()
        self._tell(text)

    def _tell(self, text: str) -> None:
        self._console.print(Text(visible(text), "dim"), soft_wrap=True)

    def on_load(self, read: int, total: int) -> None:
        """So many bytes of the model's files are read."""
        if not self._console.is_terminal:
            return
        if self._bar is None:
            self._bar = Progress(
                BarColumn(bar_width=None), DownloadColumn(), console=self._console, transient=True
            )
            self._task = self._bar.add_task("", total=total)
            self._bar.start()
        self._bar.update(self._task, completed=read)
        if read == total:
            self.close()

    def on_data(self, lines: Sequence[str]) -> None:
        """What of the data was dropped, cut or not read."""
        self.close()
        for line in lines:
            self._console.print(Text(visible(line), "yellow"), soft_wrap=True)

    def on_reading(self, source: str, done: int, size: int, records: int) -> None:
        """A part of a source is tokenised: a bar on a terminal, else a line every few seconds.

        size: bytes in all, 0 where that is not known.
        """
        if self._console.is_terminal:
            self._show_reading(source, done, size, records)
            return
        now = time.monotonic()
        if source != self._reading:
            self._reading, self._reading_began = source, (now, done)
        if now - self._told_reading < READING_SECONDS:
            return
        self._told_reading = now
        share = f" ({min(done / size, 1):.0%})" if size else ""
        self._tell(f"reading {source}: {records:,} records{share}{self._pace(now, done, size)}")

    def _pace(self, now: float, done: int, size: int) -> str:
        """', 7.4 MB/s, 12 s left' of what is read; nothing where that is not known yet."""
        began, before = self._reading_began
        if now <= began or done <= before:
            return ""
        rate = (done - before) / (now - began)
        left = f", {duration_text((size - done) / rate)} left" if done < size else ""
        return f", {rate / 1e6:.1f} MB/s{left}"

    def _show_reading(self, source: str, done: int, size: int, records: int) -> None:
        if self._bar is None or source != self._reading:
            self.close()
            self._reading = source
            columns = [BarColumn(bar_width=None), TaskProgressColumn()]
            columns += [TextColumn("{task.fields[facts]}"), TransferSpeedColumn()]
            if size:
                columns.append(TimeRemainingColumn(compact=True))
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("", total=size or None, completed=done, facts="")
            self._bar.start()
        facts = f"{visible(source)}: {records:,} records"
        self._bar.update(self._task, completed=min(done, size) if size else done, facts=facts)

    def on_start(self, trainer: Beginning) -> None:
        """Training begins, or continues at trainer.state.step."""
        self.close()
        self._total, self._first = trainer.total_steps, trainer.state.step
        self._started = time.monotonic()
        if (before := trainer.state.before) is not None:
            self._probe = before.probe
        if 0 < self._first < self._total:
            self.stage(f"continuing from step {self._first:,}")
        if self._console.is_terminal:
            self._bar = Progress(
                BarColumn(bar_width=None),
                TextColumn("{task.completed:,}/{task.total:,}"),
                TextColumn("[dim]{task.fields[facts]}"),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task("", total=self._total, completed=self._first, facts="")
            self._bar.start()

    def on_step(self, metrics: StepMetrics) -> None:
        """An optimiser step is done."""
        first = self._tokens == 0
        self._loss = metrics.loss if first else REMEMBER * self._loss + 0.1 * metrics.loss
        if "reward" in metrics.metrics:  # of the round that began with the step
            self._reward = f" · reward {metrics.metrics['reward']:.3f}"
        self._tokens += metrics.tokens
        self._seconds += metrics.tokens / metrics.tokens_per_second
        if self._bar is not None:
            self._bar.update(self._task, completed=metrics.step, facts=self._facts(metrics.step))
        elif self._line_is_due(metrics.step):
            self._console.print(
                f"step {metrics.step:>{len(str(self._total))}}/{self._total}  "
                f"{self._facts(metrics.step)}",
                highlight=False,
                soft_wrap=True,
            )

    def on_eval(self, step: int, result: HeldoutResult) -> None:
        """The held-out data were measured."""
        said = f"held-out reward {result.metrics.get('reward', 0):.3f}"
        self._heldout = f"{result.metrics.get('reward', 0):.3f}"
        if result.accuracy is not None:
            self._heldout = f"{result.loss:.3f}"
            of_pairs = result.metrics.get("rewards/accuracies")
            right = f"token accuracy {result.accuracy:.1%}"
            if of_pairs is not None:  # tokens of both answers say little
                right = f"pair accuracy {of_pairs:.1%}"
            said = f"held-out loss {result.loss:.3f}, {right}"
        if result.probe is not None:
            before = self._probe = self._probe or result.probe
            said += f", probe loss {result.probe.loss:.3f}"
            said += f" ({result.probe.rise_over(before):+.1%})" if step else ""
        self._console.print(
            f"step {step:,}: {said}",
            highlight=False,
            soft_wrap=True,
        )

    def on_end(self, result: TrainResult) -> None:
        """Training ended, for whatever reason."""
        self.close()

    def close(self) -> None:
        """Leave the console as it was, also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _facts(self, step: int) -> str:
        remaining = (time.monotonic() - self._started) / (step - self._first) * (self._total - step)
        heldout = f" · held-out {self._heldout}" if self._heldout else ""
        speed = self._tokens / self._seconds
        left = f" · {duration_text(remaining)} left" if step < self._total else ""
        return f"loss {self._loss:.3f}{self._reward}{heldout} · {speed:,.0f} tokens/s{left}"

    def _line_is_due(self, step: int) -> bool:
        every = max(1, self._total // PLAIN_LINES)
        return step % every == 0 or step in (self._first + 1, self._total)


def render_outcome(outcome: Outcome) -> RenderableType:
    """The result of a finished run: samples, before and after, where the files are."""
    summary = outcome.summary
    assert summary is not None, "an interrupted run has no summary"
    samples = summary["samples"]
    shown = differing_parts([sample["prompt"] for sample in samples])
    panels = [_sample_panel(*pair) for pair in zip(samples, shown, strict=True)]
    measures = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for heading in ("", "before", "after", ""):
        measures.add_column(heading, justify="right" if heading else "left")
    for row in comparisons(summary):
        style = {True: "green", False: "red", None: ""}[row.better]
        measures.add_row(row.name, row.before, Text(row.after, "bold"), Text(row.change, style))
    facts = (
        f"{summary['steps']:,} steps and {summary['train_tokens']:,} tokens in "
        f"{duration_text(summary['train_seconds'])}: {summary['tokens_per_second']:,.0f} tokens/s, "
        f"peak memory {bytes_text(summary['peak_memory_bytes'])}"
    )
    weights = "adapter" if summary["config"]["lora"] else "model"
    run = RunFolder(outcome.folder)
    files = Table.grid(padding=(0, 2))
    files.add_column()
    files.add_column(overflow="fold")
    files.add_row("report", Text(visible(str(run.report))))
    files.add_row(weights, Text(visible(str(run.adapter))))
    return Group(*panels, Text(), measures, Text(), Text(facts), Text(), files)


def _sample_panel(sample: dict[str, str], prompt: str) -> RenderableType:
    answers = Table.grid(padding=(0, 2))
    answers.add_column(style="dim", no_wrap=True)
    answers.add_column(overflow="fold", ratio=1)
    for name, style in (("before", ""), ("after", "bold"), ("reference", "")):
        answers.add_row(name, Text(_shortened(sample[name]) or "(nothing)", style))
    content = Group(
        Text(_shortened(prompt), style="cyan", no_wrap=True, overflow="ellipsis"), Text(), answers
    )
    title = Text(visible(sample["origin"])) if sample["origin"] else None
    return Panel(content, title=title, title_align="left", border_style="dim")


def _shortened(text: str) -> str:
    """The first lines of `text`, as they can be shown."""
    lines = visible(text).strip("\n").splitlines()
    return "\n".join([*lines[:SHOWN_LINES], "…"] if len(lines) > SHOWN_LINES else lines)
