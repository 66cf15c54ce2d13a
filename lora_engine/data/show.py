"""A data report on the terminal."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lora_engine.data.account import ignored_line
from lora_engine.data.inspect import DataReport, Sample
from lora_engine.data.listing import PLACES

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text


def render(reports: Sequence[DataReport]) -> "Group":
    """The reports (training data first) as one rich renderable."""
    from rich.console import Group
    from rich.rule import Rule
    from rich.text import Text

    parts: list[RenderableType] = []
    for data in reports:
        parts += [Rule(Text(data.name)), _counts(data), "", _histogram(data), "", *_findings(data)]
        parts += [_sample_text(shown) for shown in data.samples]
    return Group(*parts)


def _counts(data: DataReport) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in data.kinds)
    share = data.num_targets / data.num_tokens
    table.add_row("records", f"{data.num_records:,}" + (f" ({kinds})" if kinds else ""))
    formats = ", ".join(f"{name} ({count:,})" for name, count in data.formats)
    if formats:
        table.add_row("format" + "s" * (len(data.formats) > 1), formats)
    for source, own, taken in data.mixture:
        table.add_row("of an epoch", Text(f"{taken:,} examples of {own:,} in {source}"))
    adapters = ", ".join(f"{count:,} for {name}" for name, count in data.adapters)
    examples = f"{data.num_examples:,}" + (f" ({adapters})" if adapters else "")
    table.add_row("examples", Text(examples))  # names of adapters are not markup
    if data.roles:
        table.add_row("answers", ", ".join(f"{count:,} {role}" for role, count in data.roles))
    table.add_row("tokens", f"{data.num_tokens:,}")
    table.add_row("learned from", f"{data.num_targets:,} tokens ({share:.1%})")
    table.add_row(
        "tokens per example",
        f"{data.length_min:,} to {data.length_max:,}, median {data.length_median:,}",
    )
    if data.length_common:
        table.add_row("all begin with", f"the same {data.length_common:,} tokens")
    return table


def _histogram(data: DataReport) -> "Table":
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_row("tokens", "examples", "", style="bold")
    tallest = max(entry.count for entry in data.histogram)
    for entry in data.histogram:
        bar = "█" * -(-entry.count * 40 // tallest)  # any example shows
        table.add_row(f"{entry.low:,} to {entry.high - 1:,}", f"{entry.count:,}", bar)
    return table


def _findings(data: DataReport) -> "list[Text]":
    from rich.text import Text

    rows = [_finding("truncated to max_length", data.truncated)]
    reasons = dict.fromkeys(dropped.reason for dropped in data.dropped)
    for reason in reasons:
        origins = [dropped.origin for dropped in data.dropped if dropped.reason == reason]
        rows.append(_finding(f"dropped, {reason}", origins))
    if not reasons:
        rows.append(_finding("dropped", ()))
    rows.append(
        _finding("duplicates (kept)", [f"{d.origin} repeats {d.first}" for d in data.duplicates])
    )
    rows += [_titled(note.text, note.count, note.origins) for note in data.notes]
    if data.ignored:
        rows.append(Text(ignored_line(data.ignored), style="yellow"))
    if data.leakage is not None:
        pairs = data.leakage.examples
        rows.append(_finding("also in the training data", [f"{a} is {b}" for a, b in pairs]))
        pairs = data.leakage.prompts
        rows.append(_finding("prompt also in the training data", [f"{a} as {b}" for a, b in pairs]))
    if data.near is not None:
        alike = [f"{near.origin} is {near.likeness:.0%} of {near.other}" for near in data.near]
        rows.append(_finding("nearly in the training data", alike))
    return rows + _about_answers(data)


def _about_answers(data: DataReport) -> "list[Text]":
    from rich.text import Text

    about, rows = data.quality, []
    for same in about.same_answers:
        rows.append(_titled(f"the same answer, {same.text!r}", same.count, same.origins))
    if about.refusals is not None:
        rows.append(_titled("answers that refuse", about.refusals.count, about.refusals.origins))
    if about.scripts:
        letters = sum(count for _, count in about.scripts)
        shares = [f"{name} {count / letters:.1%}" for name, count in about.scripts[:5]]
        rows.append(Text(f"scripts: {', '.join(shares)}"))
    if about.unknown:
        rows.append(_titled("tokens unknown to the tokenizer", about.unknown, ()))
    if about.split_badly:
        words = [f"{word} ({tokens} tokens)" for word, tokens, _ in about.split_badly]
        rows.append(Text(f"words in many tokens: {', '.join(words)}"))
    return rows


def _finding(title: str, entries: Sequence[str]) -> "Text":
    return _titled(title, len(entries), entries[:PLACES])


def _titled(title: str, count: int, entries: Iterable[str]) -> "Text":
    """A finding and where the first few of `count` stand."""
    from rich.text import Text

    entries = list(entries)
    text = Text(f"{title}: ").append(f"{count:,}", style="bold yellow" if count else "")
    for entry in entries:
        text.append(f"\n  {entry}")
    if count > len(entries):
        text.append(f"\n  … and {count - len(entries):,} more")
    return text


def _sample_text(shown: Sample) -> "Text":
    from rich.text import Text

    text = Text(f"\n{shown.origin} ", style="bold")
    text.append("(green: learned from; every other token underlined)\n", style="not bold dim")
    for number, (piece, supervised) in enumerate(shown.tokens):
        colour = " green" if supervised else ""
        text.append(piece, style=f"not bold{colour}{' underline' if number % 2 else ''}")
    if sum(len(piece) for piece, _ in shown.tokens) < sum(len(run) for run, _ in shown.runs):
        text.append(" …", style="not bold dim")
    return text
