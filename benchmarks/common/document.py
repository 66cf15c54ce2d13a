"""Results as a page: one list of parts, told in a terminal, in Markdown and in a browser."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TypeAlias

import lora_engine
from benchmarks.common.text_table import table


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph, or a list of lines."""

    lines: tuple[str, ...]
    listed: bool = False


@dataclass(frozen=True)
class Table:
    """left: how many of the first columns are text."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1


@dataclass(frozen=True)
class Plot:
    """name: what the file of the chart is called after the result's name. svg: the chart."""

    name: str
    title: str
    svg: str


Part: TypeAlias = Heading | Text | Table | Plot


def text(*lines: str, listed: bool = False) -> Text:
    return Text(tuple(line for line in lines if line), listed)


def markdown(parts: Sequence[Part], name: str | None = None) -> str:
    """name: of the result, whose charts lie beside it; None: without charts, for a terminal."""
    found = []
    for part in parts:
        match part:
            case Heading():
                found.append(f"{'#' * part.level} {part.text}")
            case Text():
                found.append("\n".join(f"- {x}" if part.listed else x for x in part.lines))
            case Table():
                found.append(table(part.columns, part.rows, left=part.left))
            case Plot() if name is not None:
                found.append(f"![{part.title}]({name}-{part.name}.svg)")
    return "\n\n".join(filter(None, found))


def page(title: str, parts: Sequence[Part]) -> str:
    """One self-contained page in the style of a run's report."""
    assert lora_engine.__file__ is not None
    css = Path(lora_engine.__file__).parent / "report" / "templates" / "report.css"
    body = "\n".join(map(_html, parts))
    return f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{css.read_text(encoding="utf-8")}
.table {{ overflow-x: auto; padding: 6px 18px; margin: 14px 0; }}
.table th, .table td {{ padding: 5px 14px 5px 0; text-align: right; white-space: nowrap; }}
.table .words {{ text-align: left; }}
.table thead th {{ color: var(--soft); font-weight: 500; font-size: .82rem; }}
.table tbody tr > * {{ border-top: 1px solid var(--line); }}
.table tbody th {{ font-weight: 500; }}
main > p, main > ul {{ margin: 10px 0; max-width: 62em; }}
main > svg {{ display: block; width: 100%; height: auto; margin: 14px 0; }}
</style>
</head>
<body>
<main>
<p class="eyebrow">lora_engine · benchmark</p>
{body}
</main>
</body>
</html>
"""


def _html(part: Part) -> str:
    match part:
        case Heading():
            return f"<h{part.level}>{_inline(part.text)}</h{part.level}>"
        case Text():
            if part.listed:
                return f"<ul>{''.join(f'<li>{_inline(x)}</li>' for x in part.lines)}</ul>"
            return f"<p>{'<br>'.join(map(_inline, part.lines))}</p>"
        case Table():
            return _html_table(part)
        case Plot():
            return part.svg


def _html_table(part: Table) -> str:
    def line(cells: Sequence[str], heading: bool) -> str:
        found = []
        for i, cell in enumerate(cells):
            kind = ' class="words"' if i < part.left else ""
            tag = "th" if heading or i == 0 else "td"
            found.append(f"<{tag}{kind}>{_inline(cell)}</{tag}>")
        return f"<tr>{''.join(found)}</tr>"

    rows = "".join(line(row, False) for row in part.rows)
    head = line(part.columns, True)
    return (
        f'<div class="card table"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
    )


def _inline(words: str) -> str:
    """Markdown's `code` as code; everything else as it is."""
    pieces = words.split("`")
    return "".join(
        f"<code>{escape(x)}</code>" if i % 2 and i < len(pieces) - 1 else escape(x)
        for i, x in enumerate(pieces)
    )
