"""A data report as one self-contained page."""

from collections.abc import Sequence
from pathlib import Path

from lora_engine.data.account import ignored_line
from lora_engine.data.inspect import DataReport
from lora_engine.errors import UserError, reason
from lora_engine.files import user_path, write_text
from lora_engine.report.template import rendered


def write_data_page(path: str | Path, name: str, reports: Sequence[DataReport]) -> None:
    """Write the page about the reports, training data first. Raises UserError for a bad path."""
    try:
        file = user_path(path)
    except ValueError as error:
        raise UserError(f"--html: {reason(error)}") from error
    write_text(file, data_page(name, reports))


def data_page(name: str, reports: Sequence[DataReport]) -> str:
    """The page as a string."""
    return rendered(
        "data.html.j2",
        name=name,
        reports=reports,
        ignored_line=ignored_line,
        tallest=[max(entry.count for entry in report.histogram) for report in reports],
        letters=[sum(count for _, count in report.quality.scripts) or 1 for report in reports],
    )
