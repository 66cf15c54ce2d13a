"""A data source as tokenized examples, with an account of every record that is not among them."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, overload

import numpy as np

from lora_engine.data.batch import MISMATCHED
from lora_engine.data.encode import Encoder
from lora_engine.data.formats.columns import RECOGNISED, Layout
from lora_engine.data.inputs import NO_INPUTS, TemplateInputs
from lora_engine.data.listing import group, raise_listed, without_origin
from lora_engine.data.pairs import check_answers, example_of, with_mismatched
from lora_engine.data.records import Record, Source, read_records
from lora_engine.data.render import Example, LossOn
from lora_engine.data.template import Tokenizer, Undecided
from lora_engine.errors import UserError

NO_ANSWER = "nothing to learn from: the answer is empty"
NO_ASSISTANT = "nothing to learn from: no message has the role 'assistant'"
NOT_LEARNED = "nothing to learn from: no part of an answer is to be learned"
ANSWER_CUT_OFF = "nothing to learn from: the answer lies beyond max_length"
TOO_LONG = "longer than max_length"
OnTooLong = Literal["truncate", "drop"]
OnUndecidable = Literal["refuse", "drop"]


@dataclass(frozen=True)
class Dropped:
    """A record that is not trained on, and why."""

    origin: str
    reason: str


@dataclass(frozen=True)
class Duplicate:
    """A record whose tokens, mask and adapter are those of an earlier one."""

    origin: str
    first: str


@dataclass(frozen=True)
class TokenizedDataset(Sequence[Example]):
    """Examples in the order of their records.

    name: what the data is called in messages.
    kinds: number of records of each kind, dropped ones included. formats: the same of formats.
    duplicates: examples that repeat an earlier one. They stay in: repeating may be meant.
    ignored: fields of records, and keys of messages as "messages.KEY", that hold something and
        that nothing reads, each with its number of records.
    """

    examples: Sequence[Example]
    name: str = "data"
    kinds: tuple[tuple[str, int], ...] = ()
    formats: tuple[tuple[str, int], ...] = ()
    dropped: tuple[Dropped, ...] = ()
    duplicates: tuple[Duplicate, ...] = ()
    ignored: tuple[tuple[str, int], ...] = ()

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
        """Records read: examples and dropped ones."""
        return len(self.examples) + len(self.dropped)

    @property
    def truncated(self) -> tuple[str, ...]:
        """Origins of the examples that were cut to max_length."""
        return tuple(
            example.origin
            for example in self.examples
            if any(sequence.truncated for sequence in example.sequences)
        )


@dataclass(frozen=True)
class Leakage:
    """What of the evaluation data is also in the training data, as the origins (eval, train).

    What trains another adapter gives nothing away.

    examples: the same tokens.
    prompts: the same tokens up to the answer, with another answer.
    """

    examples: tuple[tuple[str, str], ...]
    prompts: tuple[tuple[str, str], ...]


def prepare(
    source: "Source | TokenizedDataset",
    tokenizer: Tokenizer,
    *,
    max_length: int | None = 2048,
    loss_on: LossOn = "assistant",
    on_too_long: OnTooLong = "truncate",
    on_undecidable: OnUndecidable = "refuse",
    train_on_reasoning: bool = True,
    train_on_tool_calls: bool = True,
    inputs: TemplateInputs = NO_INPUTS,
    split: str | None = None,
    limit: int | None = None,
    layout: Layout = RECOGNISED,
) -> TokenizedDataset:
    """Read, render and tokenize `source` (see `read_records`); a TokenizedDataset stays as it is.

    max_length: longest example in tokens; None for no limit.
    on_too_long: "truncate" keeps the first max_length tokens, or the last of the prompt and the
        answer where answers are compared or judged; "drop" leaves the record out.
    on_undecidable: "refuse" counts a record as malformed that the chat template cannot write or
        whose learned tokens cannot be told from the rest, "drop" leaves it out.
    loss_on, train_on_reasoning, train_on_tool_calls: what is learned, see `tokenize`.
    inputs: what the chat template is given where a record brings nothing of its own.
    split: split of a hub dataset.
    limit: use only the first `limit` records.
    layout: what the records' fields are, where that is not to be recognised.

    A record with nothing to learn from is dropped and accounted for. Raises UserError for a
    source that cannot be read, malformed records (all are listed), or no example left.
    """
    if isinstance(source, TokenizedDataset):
        return source
    if max_length is not None and max_length < 2:
        raise UserError(f"max_length must be at least 2 tokens, got {max_length}")
    records = read_records(source, split=split, layout=layout)[:limit]
    name = str(source) if isinstance(source, str) else getattr(source, "name", "data")
    examples: list[Example] = []
    dropped: list[Dropped] = []
    problems: list[tuple[str, str]] = []
    ignored: Counter[str] = Counter()
    encoder = Encoder(tokenizer, inputs)
    keep = max_length if on_too_long == "truncate" else None
    for record in records:
        try:
            example = example_of(
                record,
                tokenizer,
                max_length=keep,
                loss_on=loss_on,
                encoder=encoder,
                train_on_reasoning=train_on_reasoning,
                train_on_tool_calls=train_on_tool_calls,
            )
        except UserError as error:
            problem = without_origin(error, record.origin)
            if isinstance(error, Undecided) and on_undecidable == "drop":
                dropped.append(Dropped(*problem))
            else:
                problems.append(problem)
            continue
        ignored.update(record.ignored)
        ignored.update(example.ignored)
        reason = _reason_to_drop(record, example, max_length)
        if reason:
            dropped.append(Dropped(record.origin, reason))
        else:
            examples.append(example)
    raise_listed(name, problems, len(records))
    examples = with_mismatched(examples, max_length)
    dataset = TokenizedDataset(
        examples,
        name=name,
        kinds=tuple(sorted(Counter(record.kind for record in records).items())),
        formats=tuple(sorted(Counter(r.format for r in records if r.format).items())),
        dropped=tuple(dropped),
        duplicates=tuple(_find_duplicates(examples)),
        ignored=tuple(ignored.items()),
    )
    if not examples:
        reasons = "; ".join(
            f"{drops.count:,} times {drops.text} ({drops.places()})"
            for drops in group((drop.origin, drop.reason) for drop in dropped)
        )
        raise UserError(f"{name}: no example is left to learn from, give other data: {reasons}")
    return dataset


_Taught: TypeAlias = tuple[str, tuple[int, ...]]  # an adapter, and tokens


def find_leakage(train: Iterable[Example], evaluation: Iterable[Example]) -> Leakage:
    """Evaluation examples that the training data gives away."""
    whole: dict[_Taught, str] = {}
    prompts: dict[_Taught, str] = {}
    for example in train:
        whole.setdefault((example.adapter, tuple(example.input_ids)), example.origin)
        prompts.setdefault((example.adapter, _prompt(example)), example.origin)
    same_example, same_prompt = [], []
    for example in evaluation:
        prompt = _prompt(example)
        if origin := whole.get((example.adapter, tuple(example.input_ids))):
            same_example.append((example.origin, origin))
        elif prompt and (origin := prompts.get((example.adapter, prompt))):
            same_prompt.append((example.origin, origin))
    return Leakage(tuple(same_example), tuple(same_prompt))


def _prompt(example: Example) -> tuple[int, ...]:
    """Tokens before the first supervised one; empty for plain text."""
    return tuple(example.input_ids[: example.supervised.index(True)])


def _reason_to_drop(record: Record, example: Example, max_length: int | None) -> str | None:
    if record.drop:
        return record.drop
    if not record.has_answer():
        roles = {message["role"] for message in record.messages}
        return NO_ASSISTANT if roles and "assistant" not in roles else NO_ANSWER
    if max_length is not None and max(map(len, example.sequences)) > max_length:
        return TOO_LONG
    if example.role:
        return check_answers(example)
    if example.num_targets == 0:
        if example.truncated:
            return ANSWER_CUT_OFF
        return NOT_LEARNED if record.kind == "messages" else NO_ANSWER
    return None


def _find_duplicates(examples: Iterable[Example]) -> Iterable[Duplicate]:
    first: dict[tuple[object, ...], str] = {}
    for example in examples:
        taught = (
            (tuple(s.input_ids), tuple(s.supervised), s.role)
            for s in example.sequences
            if s.role != MISMATCHED
        )
        key = (*taught, example.adapter)
        if key in first:
            yield Duplicate(example.origin, first[key])
        else:
            first[key] = example.origin
