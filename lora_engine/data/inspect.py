"""What is in the data: the account that `lora-engine data CONFIG` prints.

`report` gathers plain numbers and texts; `show` turns them into rich renderables.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby

import numpy as np

from lora_engine.data.batch import MISMATCHED
from lora_engine.data.dataset import Dropped, TokenizedDataset
from lora_engine.data.fit import SPLIT
from lora_engine.data.leakage import Duplicate, Leakage, find_leakage
from lora_engine.data.listing import Finding, group
from lora_engine.data.near import NearDuplicate, near_duplicates
from lora_engine.data.pairs import ROLES
from lora_engine.data.prefixes import common_length
from lora_engine.data.quality import Quality, quality, token_texts
from lora_engine.data.render import Example
from lora_engine.data.template import Tokenizer
from lora_engine.data.turns import ADDED, LEARNED_THERE

HISTOGRAM_BINS = 10
SHOWN_TOKENS = 400  # of a sample
# Ends of notes about what is learned as it ought to be.
_AS_MEANT = (SPLIT, ADDED, LEARNED_THERE)


@dataclass(frozen=True)
class Bin:
    """Examples with low <= tokens < high."""

    low: int
    high: int
    count: int


@dataclass(frozen=True)
class Sample:
    """One example's text, in runs of (text, supervised).

    tokens: its first tokens as (text, supervised).
    """

    origin: str
    runs: tuple[tuple[str, bool], ...]
    tokens: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True)
class DataReport:
    """The account of one dataset. Tokens count every token, targets those the loss is taken over.

    length_common: tokens that all examples begin with in common.
    leakage: what of this data is also in the training data; None for the training data itself.
    adapters: examples that name each adapter.
    roles: sequences of each `Example.role`: chosen and rejected answers, say.
    notes: what was done with texts that their authors may not expect.
    ignored: fields that nothing reads, and how many records have them.
    formats: records of each format. mixture: see `TokenizedDataset`.
    near: what is nearly the same as a training example; None for the training data itself.
    quality: what answers are like.
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
    formats: tuple[tuple[str, int], ...] = ()
    mixture: tuple[tuple[str, int, int], ...] = ()
    near: tuple[NearDuplicate, ...] | None = None
    quality: Quality = field(default_factory=Quality)

    def wrong(self) -> tuple[str, ...]:
        """What ought to be mended before training, in words; empty if nothing is."""
        leakage = self.leakage or Leakage((), ())
        labels = {role: count for role, count in self.roles if role in ROLES["labelled"]}
        counts = {
            "records are dropped": len(self.dropped),
            "examples are cut to max_length": len(self.truncated),
            "examples repeat an earlier one": len(self.duplicates),
            "examples are also in the training data": len(leakage.examples),
            "prompts are also in the training data": len(leakage.prompts),
            "examples are nearly in the training data": len(self.near or ()),
            "tokens are unknown to the tokenizer": self.quality.unknown,
            "examples share an answer": sum(same.count for same in self.quality.same_answers),
            "answers are refusals": self.quality.refusals.count if self.quality.refusals else 0,
            "texts were not taken as they are": sum(
                note.count for note in self.notes if not note.text.endswith(_AS_MEANT)
            ),
        }
        said = [f"{count:,} {what}" for what, count in counts.items() if count]
        if len(labels) == 1:
            said.append(f"every label is the same ({next(iter(labels))})")
        return tuple(said)

    def as_json(self) -> dict[str, object]:
        """The report as JSON values."""
        return {**asdict(self), "wrong": list(self.wrong())}


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
        formats=dataset.formats,
        mixture=dataset.mixture,
        near=near_duplicates(train, dataset) if train is not None else None,
        quality=quality(dataset, tokenizer),
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
    shown = token_texts(example.input_ids[:SHOWN_TOKENS], tokenizer)
    return Sample(
        f"{example.origin}, {example.role}" if example.role else example.origin,
        tuple(
            (tokenizer.decode([token for token, _ in run]), supervised)
            for supervised, run in groupby(tokens, key=lambda token: token[1])
        ),
        tuple(zip(shown, example.supervised, strict=False)),
    )


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
