"""A data source as tokenized examples, with an account of every record that is not among them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from lora_engine.data.batch import MISMATCHED
from lora_engine.data.chat import LossOn
from lora_engine.data.chunks import chunks_of, first_rows
from lora_engine.data.fit import OnTooLong
from lora_engine.data.formats.columns import RECOGNISED, Layout
from lora_engine.data.inputs import NO_INPUTS, TemplateInputs
from lora_engine.data.leakage import Duplicate, find_duplicates
from lora_engine.data.listing import group, raise_listed
from lora_engine.data.pairs import ROLES, with_mismatched
from lora_engine.data.recipe import OnUndecidable, Recipe
from lora_engine.data.records import Source
from lora_engine.data.render import Example
from lora_engine.data.store import OutcomeStore, StoredExamples
from lora_engine.data.template import Tokenizer
from lora_engine.data.tokenising import Progress, tokenise
from lora_engine.errors import UserError


@dataclass(frozen=True)
class Dropped:
    """A record that is not trained on, and why."""

    origin: str
    reason: str


@dataclass(frozen=True)
class TokenizedDataset(Sequence[Example]):
    """Examples in the order of their records.

    name: what the data is called in messages.
    kinds: number of records of each kind, dropped ones included. formats: the same of formats.
    duplicates: examples that repeat an earlier one. They stay in: repeating may be meant.
    ignored: fields of records, and keys of messages as "messages.KEY", that hold something and
        that nothing reads, each with its number of records.
    records: number of records read, where an example is not a record.
    mixture: of each source that has a share its name, its examples, and how many an epoch takes.
    """

    examples: Sequence[Example]
    name: str = "data"
    kinds: tuple[tuple[str, int], ...] = ()
    formats: tuple[tuple[str, int], ...] = ()
    dropped: tuple[Dropped, ...] = ()
    duplicates: tuple[Duplicate, ...] = ()
    ignored: tuple[tuple[str, int], ...] = ()
    records: int | None = None
    mixture: tuple[tuple[str, int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        return self.examples[index]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each of the examples' sequences, int64."""
        return np.array([len(sequence) for sequence in self.sequences()], dtype=np.int64)

    def sequences(self) -> Iterator[Example]:
        """The examples, each followed by its `others`."""
        return (sequence for example in self.examples for sequence in example.sequences)

    def has_column(self, name: str) -> bool:
        """Whether any example has a column of that name."""
        if isinstance(self.examples, StoredExamples):
            return self.examples.store.has_column(name)
        return any(name in sequence.columns for sequence in self.sequences())

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples."""
        return int(self.lengths.sum())

    @property
    def num_targets(self) -> int:
        """Tokens that the loss is taken over."""
        return sum(s.num_targets for s in self.sequences() if s.role != MISMATCHED)

    @property
    def num_records(self) -> int:
        """Records read: learned from or dropped."""
        return len(self.examples) + len(self.dropped) if self.records is None else self.records

    @property
    def truncated(self) -> tuple[str, ...]:
        """Origins of the examples that were cut to max_length."""
        return tuple(
            example.origin
            for example in self.examples
            if any(sequence.truncated for sequence in example.sequences)
        )


def prepare(
    source: "Source | TokenizedDataset",
    tokenizer: Tokenizer,
    *,
    split: str | None = None,
    limit: int | None = None,
    processes: int = 1,
    progress: Progress | None = None,
    max_length: int | None = 2048,
    on_too_long: OnTooLong = "split",
    on_undecidable: OnUndecidable = "refuse",
    loss_on: LossOn = "assistant",
    train_on_reasoning: bool = True,
    train_on_tool_calls: bool = True,
    inputs: TemplateInputs = NO_INPUTS,
    layout: Layout = RECOGNISED,
) -> TokenizedDataset:
    """Read, render and tokenize `source` (see `read_records`); a TokenizedDataset stays as it is.

    split: split of a folder or a hub dataset.
    limit: use only the first `limit` records.
    processes: how many tokenise.
    progress: is told of bytes and records that are done.
    The rest, which decides the tokens, is as in `recipe.Recipe`.

    A record with nothing to learn from is dropped and accounted for. Raises UserError for a
    source that cannot be read, malformed records (all are listed), or no example left.
    """
    if isinstance(source, TokenizedDataset):
        return source
    recipe = Recipe(
        max_length=max_length,
        on_too_long=on_too_long,
        on_undecidable=on_undecidable,
        loss_on=loss_on,
        train_on_reasoning=train_on_reasoning,
        train_on_tool_calls=train_on_tool_calls,
        inputs=inputs,
        layout=layout,
    )
    name, chunks = chunks_of(source, split)
    name = getattr(source, "name", name)
    done = tokenise(
        chunks if limit is None else first_rows(chunks, limit),
        recipe,
        tokenizer,
        processes=processes,
        progress=progress,
    )
    raise_listed(name, done.problems, len(done.store) + len(done.problems))
    return dataset_of(name, done.store, range(len(done.store)), recipe.max_length)


def dataset_of(
    name: str, store: OutcomeStore, records: Sequence[int], max_length: int | None
) -> TokenizedDataset:
    """Some records of a store, by number. Raises UserError where none is learned from."""
    if not len(records):
        raise UserError(f"{name}: holds no records; give a source that has some")
    dropped: list[Dropped] = []
    kinds, formats, ignored = Counter[str](), Counter[str](), Counter[str]()
    numbers: list[int] = []
    owners: list[int] = []
    for record in records:
        kind, format, reason, unread = store.about(record)
        kinds[kind] += 1
        formats.update([format] if format else [])
        ignored.update(unread)
        if reason:
            dropped.append(Dropped(store.origin(record), reason))
        of_record = store.examples_of(record)
        numbers += of_record
        owners += [record] * len(of_record)
    stored = StoredExamples(store, np.array(numbers, np.int64), np.array(owners, np.int64))
    if not numbers:
        reasons = "; ".join(
            f"{drops.count:,} times {drops.text} ({drops.places()})"
            for drops in group((drop.origin, drop.reason) for drop in dropped)
        )
        raise UserError(f"{name}: no example is left to learn from, give other data: {reasons}")
    examples: Sequence[Example] = stored
    if stored[0].role in ROLES["labelled"]:
        examples = with_mismatched(list(stored), max_length)
    return TokenizedDataset(
        examples,
        name=name,
        kinds=tuple(sorted(kinds.items())),
        formats=tuple(sorted(formats.items())),
        dropped=tuple(dropped),
        duplicates=tuple(find_duplicates(stored)),
        ignored=tuple(ignored.items()),
        records=len(records),
    )
