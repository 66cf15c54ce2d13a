"""What is in the data: the account that `lora-engine data CONFIG` prints.

`report` gathers plain numbers and texts; `render` turns them into rich renderables.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from lora_engine.data.account import ignored_line
from lora_engine.data.batch import MISMATCHED
from lora_engine.data.dataset import Dropped, TokenizedDataset
from lora_engine.data.leakage import Duplicate, Leakage, find_leakage
from lora_engine.data.listing import PLACES, Finding, group
from lora_engine.data.prefixes import common_length
from lora_engine.data.render import Example
from lora_engine.data.template import Tokenizer

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

HISTOGRAM_BINS = 10


@dataclass(frozen=True)
class Bin:
    """Examples with low <= tokens < high."""

    low: int
    high: int
    count: int


@dataclass(frozen=True)
class Sample:
    """One example's text, in runs of (text, supervised)."""

    origin: str
    runs: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class DataReport:
    """The account of one dataset. Tokens count every token, targets those the loss is taken over.

    length_common: tokens that all examples begin with in common.
    leakage: what of this data is also in the training data; None for the training data itself.
    adapters: examples that name each adapter.
    roles: sequences of each `Example.role`: chosen and rejected answers, say.
    notes: what was done with texts that their authors may not expect.
    ignored: fields that nothing reads, and how many records have them.
    """

    name: str
    num_records: int
    num_examples: int
    kinds: tuple[tuple[str, int], ...]
    num_tokens: int
    num_targets: int
    length_min: int
    length_median: int
    length_max: int
    length_common: int
    histogram: tuple[Bin, ...]
    truncated: tuple[str, ...]
    dropped: tuple[Dropped, ...]
    duplicates: tuple[Duplicate, ...]
    samples: tuple[Sample, ...]
    leakage: Leakage | None = None
    adapters: tuple[tuple[str, int], ...] = ()
    notes: tuple[Finding, ...] = ()
    ignored: tuple[tuple[str, int], ...] = ()
    roles: tuple[tuple[str, int], ...] = ()


def report(
    dataset: TokenizedDataset,
    tokenizer: Tokenizer,
    *,
    train: TokenizedDataset | None = None,
    num_samples: int = 3,
) -> DataReport:
    """The account of `dataset`; with `train`, also of what it shares with the training data."""
    lengths = dataset.lengths
    return DataReport(
        name=dataset.name,
        num_records=dataset.num_records,
        num_examples=len(dataset),
        kinds=dataset.kinds,
        num_tokens=dataset.num_tokens,
        num_targets=dataset.num_targets,
        length_min=int(lengths.min()),
        length_median=int(np.median(lengths)),
        length_max=int(lengths.max()),
        length_common=common_length(
            [np.asarray(example.input_ids) for example in dataset], range(len(dataset))
        ),
        histogram=length_histogram(lengths),
        truncated=dataset.truncated,
        dropped=dataset.dropped,
        duplicates=dataset.duplicates,
        samples=tuple(
            sample(sequence, tokenizer)
            for example in _spread(dataset, num_samples)
            for sequence in example.sequences
            if sequence.role != MISMATCHED
        ),
        roles=tuple(Counter(e.role for e in dataset.sequences() if e.role).items()),
        leakage=find_leakage(train, dataset) if train is not None else None,
        adapters=tuple(Counter(e.adapter for e in dataset if e.adapter).items()),
        notes=group((example.origin, note) for example in dataset for note in example.notes),
        ignored=dataset.ignored,
    )


def length_histogram(lengths: np.ndarray, bins: int = HISTOGRAM_BINS) -> tuple[Bin, ...]:
    """At most `bins` bins of one width, a round number of tokens, that hold every length."""
    width = _round_width((int(lengths.max()) + 1) / bins)
    first = int(lengths.min()) // width
    counts = np.bincount(lengths // width - first)
    return tuple(
        Bin((first + i) * width, (first + i + 1) * width, int(count))
        for i, count in enumerate(counts)
    )


def sample(example: Example, tokenizer: Tokenizer) -> Sample:
    """The example's text as the model sees it, special tokens included."""
    tokens = zip(example.input_ids, example.supervised, strict=True)
    return Sample(
        f"{example.origin}, {example.role}" if example.role else example.origin,
        tuple(
            (tokenizer.decode([token for token, _ in run]), supervised)
            for supervised, run in groupby(tokens, key=lambda token: token[1])
        ),
    )


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


def _round_width(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, … that is at least `least`."""
    power = 1
    while True:
        for digit in (1, 2, 5):
            if digit * power >= least:
                return digit * power
        power *= 10


def _spread(examples: Sequence[Example], count: int) -> list[Example]:
    """`count` examples at even distances, or all if there are fewer."""
    count = min(count, len(examples))
    return [examples[i * len(examples) // count] for i in range(count)]


def _counts(data: DataReport) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in data.kinds)
    share = data.num_targets / data.num_tokens
    table.add_row("records", f"{data.num_records:,}" + (f" ({kinds})" if kinds else ""))
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
    text.append("(green: learned from)\n", style="not bold dim")
    for run, supervised in shown.runs:
        text.append(run, style="not bold green" if supervised else "not bold")
    return text
