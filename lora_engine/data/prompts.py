"""Prompts alone, for a model that writes the answers itself: their tokens, and what judges them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lora_engine.data.chunks import chunks_of, first_rows
from lora_engine.data.dataset import Dropped, TokenizedDataset
from lora_engine.data.encode import Encoder
from lora_engine.data.formats.columns import RECOGNISED, Layout
from lora_engine.data.heldout import choose_heldout
from lora_engine.data.inputs import NO_INPUTS, TemplateInputs
from lora_engine.data.listing import raise_listed, without_origin
from lora_engine.data.pairs import PROMPT
from lora_engine.data.preferences import Said
from lora_engine.data.readers import RowError
from lora_engine.data.recipe import TOO_LONG
from lora_engine.data.records import Record, Source, record_of
from lora_engine.data.render import Example
from lora_engine.data.template import Message, Tokenizer, render
from lora_engine.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """asked: text or messages, as the record has it. columns: the record's other fields."""

    asked: Said
    columns: Mapping[str, object]


@dataclass(frozen=True)
class PromptDataset(TokenizedDataset):
    """Examples of which no token is learned from; `prompts` has what each of them was made of.

    keys: a digest of each record's content. groups: prompts of one group are held out together.
    """

    prompts: tuple[Prompt, ...] = ()
    keys: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()

    def part(self, numbers: Sequence[int], name: str) -> "PromptDataset":
        """Some of the prompts, in that order, as if the others had not been read."""
        kinds = (("prompt", len(numbers)),)
        return PromptDataset(
            [self.examples[i] for i in numbers],
            name,
            kinds=kinds,
            ignored=self.ignored,
            records=len(numbers),
            prompts=tuple(self.prompts[i] for i in numbers),
            keys=tuple(self.keys[i] for i in numbers),
            groups=tuple(self.groups[i] for i in numbers),
        )


def columns_of(*datasets: PromptDataset | None) -> list[str]:
    """Names of the fields that any record has, in their order."""
    prompts = (prompt for data in datasets if data is not None for prompt in data.prompts)
    return list(dict.fromkeys(name for prompt in prompts for name in prompt.columns))


def prepare_prompts(
    source: "Source | PromptDataset",
    tokenizer: Tokenizer,
    *,
    split: str | None = None,
    limit: int | None = None,
    max_length: int | None = 2048,
    layout: Layout = RECOGNISED,
    inputs: TemplateInputs = NO_INPUTS,
) -> PromptDataset:
    """Read and tokenise prompts; those of more than `max_length` tokens are dropped, not cut.

    The rest is as for `data.prepare`. Raises UserError for records that are no prompts alone
    (all are listed), and where none is left.
    """
    if isinstance(source, PromptDataset):
        return source
    name, chunks = chunks_of(source, split)
    name = getattr(source, "name", name)
    if limit is not None:
        chunks = first_rows(chunks, limit)
    encoder = Encoder(tokenizer, inputs)
    examples, records, dropped, problems = [], [], [], []
    for chunk in chunks:
        for row in chunk.parsed():
            if isinstance(row, RowError):
                problems.append((row.origin, row.problem))
                continue
            try:
                record = record_of(row, layout)
                example = _example(record, encoder)
            except UserError as error:
                problems.append(without_origin(error, row.origin))
                continue
            if max_length is not None and len(example) > max_length:
                dropped.append(Dropped(record.origin, TOO_LONG))
            else:
                examples.append(example)
                records.append(record)
    total = len(examples) + len(dropped) + len(problems)
    raise_listed(name, problems, total)
    if not examples:
        why = f"all {total:,} prompts are {TOO_LONG}" if total else "holds no records"
        raise UserError(f"{name}: {why}; give a source that has prompts")
    return PromptDataset(
        examples,
        name,
        kinds=(("prompt", total),),
        dropped=tuple(dropped),
        records=total,
        prompts=tuple(Prompt(record.prompt, record.columns) for record in records),
        keys=tuple(record.content_key() for record in records),
        groups=tuple(record.group for record in records),
    )


def joined_prompts(parts: Sequence[PromptDataset], name: str) -> PromptDataset:
    """The prompts of several sources, one after the other."""
    return PromptDataset(
        [example for part in parts for example in part],
        name,
        kinds=(("prompt", sum(part.num_records for part in parts)),),
        dropped=tuple(dropped for part in parts for dropped in part.dropped),
        records=sum(part.num_records for part in parts),
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
        keys=tuple(key for part in parts for key in part.keys),
        groups=tuple(group for part in parts for group in part.groups),
    )


def split_prompts(
    whole: PromptDataset, fraction: float, *, seed: int = 0
) -> tuple[PromptDataset, PromptDataset]:
    """Those to train on, and those held out, none of which are in both."""
    try:
        heldout = choose_heldout(whole.keys, whole.groups, fraction, seed=seed)
    except UserError as error:
        raise UserError(f"{whole.name}: {error}") from error
    kept = sorted(set(range(len(whole))) - set(heldout))
    train = whole.part(kept, f"{whole.name}, training")
    records = len(kept) + len(whole.dropped)
    return (
        replace(train, dropped=whole.dropped, records=records),
        whole.part(heldout, f"{whole.name}, held out"),
    )


def prompt_ids(record: Record, encoder: Encoder) -> list[int]:
    """Tokens of what a record asks, up to where an answer begins.

    An answer that the record has already, as a training record does, is no part of it.
    """
    tokenizer = encoder.tokenizer
    asked = asked_messages(record)
    if asked is not None:
        given = record.given.over(encoder.inputs)
        text = render(asked, tokenizer, record.origin, generation_prompt=True, inputs=given)
        return encoder.encode(text, record.origin)
    text = record.text if record.kind == "text" else str(record.prompt)
    ids = encoder.encode(text, record.origin) if text else []
    first = encoder.control.bos[1]
    return [first, *ids] if first is not None and ids and ids[:1] != [first] else ids


def asked_messages(record: Record) -> tuple[Message, ...] | None:
    """The messages of a record before an answer that it may have; None: it is plain text."""
    messages = record.messages or record.prompt
    if isinstance(messages, str):
        return None
    while messages and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    return tuple(messages)


def _example(record: Record, encoder: Encoder) -> Example:
    if record.kind != "prompt":
        raise UserError(
            f"{record.origin}: is read as {record.kind!r}, expected 'prompt' and no answer; call "
            "the field of what is asked 'prompt', and that of an answer anything but 'completion'"
        )
    ids = prompt_ids(record, encoder)
    if not ids:
        raise UserError(f"{record.origin}: the prompt is empty; give some text")
    return Example(ids, [False] * len(ids), record.origin, adapter=record.adapter, role=PROMPT)
