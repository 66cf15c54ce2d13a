"""`lora-engine compare`: runs side by side, on the terminal and as a page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lora_engine.errors import UserError
from lora_engine.files import write_text
from lora_engine.report.compare import (
    Run,
    comparison_json,
    comparison_page,
    differing_settings,
    figures,
    measured_alike,
    read_runs,
)
from lora_engine.report.template import COMPARISON, page_path
from lora_engine.text import visible

as_json = comparison_json
_ABREAST = 5  # runs beside each other on a terminal


@dataclass(frozen=True)
class Compared:
    """page: the file that was written; None if none was to be."""

    runs: list[Run]
    page: Path | None


def compare(paths: Sequence[str], html: str | None) -> Compared:
    """Reads the runs and writes the page. Raises UserError for fewer than two runs, a folder
    without one, and a file that is no such page already."""
    if len(paths) < 2:
        raise UserError("compare: give two runs or more")
    page = None if html is None else page_path(html, COMPARISON)
    runs = read_runs(paths)
    if page is not None:
        write_text(page, comparison_page(runs))
    return Compared(runs, page)


def render(compared: Compared) -> RenderableType:
    """Settings that differ and figures, a column for each run."""
    runs = compared.runs
    rows: list[tuple[Text, list[str], frozenset[int]]] = []
    rows += [(Text(visible(key), "cyan"), values, frozenset()) for key, values in _settings(runs)]
    rows += [(Text(), [""] * len(runs), frozenset())]
    rows += [(Text(figure.name), figure.texts, figure.best) for figure in figures(runs)]
    parts: list[RenderableType] = []
    for first in range(0, len(runs), _ABREAST):
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
        table.add_column("", no_wrap=True)
        shown = range(first, min(first + _ABREAST, len(runs)))
        for i in shown:
            table.add_column(runs[i].name, justify="right", overflow="fold")
        for name, texts, best in rows:
            table.add_row(name, *(_cell(texts[i], i in best) for i in shown))
        parts += [table, Text()]
    if not measured_alike(runs):
        parts += [Text("other held-out data, models or objectives: not ranked", "dim"), Text()]
    if compared.page is not None:
        parts.append(Text(visible(str(compared.page))))
    return Group(*parts)


def _settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    return differing_settings(runs) or [("no setting differs", [""] * len(runs))]


def _cell(text: str, best: bool) -> Text:
    return Text(visible(text), "bold green" if best else "")
