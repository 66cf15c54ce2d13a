"""The training and the held-out examples that a configuration's `data` section describes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lora_engine.app.chat_settings import template_inputs
from lora_engine.app.config import RunConfig
from lora_engine.app.config_data import DataConfig, DataSource
from lora_engine.data import cache
from lora_engine.data.chunks import chunks_of, first_rows, source_size
from lora_engine.data.dataset import TokenizedDataset, dataset_of, prepare
from lora_engine.data.formats.columns import RECOGNISED
from lora_engine.data.heldout import choose_heldout
from lora_engine.data.leakage import find_duplicates
from lora_engine.data.listing import raise_listed
from lora_engine.data.mixture import mixed
from lora_engine.data.probe import SHIPPED, shipped_probe
from lora_engine.data.prompts import (
    PromptDataset,
    joined_prompts,
    prepare_prompts,
    split_prompts,
)
from lora_engine.data.recipe import Recipe
from lora_engine.data.render import Example
from lora_engine.data.replay import with_replay
from lora_engine.data.sources import files_among, files_to_stream
from lora_engine.data.store import OutcomeStore, StoredExamples, joined
from lora_engine.data.stream import ExampleStream, StreamPart, streamed
from lora_engine.data.template import Tokenizer
from lora_engine.data.tokenising import PARALLEL_BYTES, Tokenised, tokenise, usable_processes
from lora_engine.errors import UserError
from lora_engine.objectives.base import NATS_PER_TARGET

# Told of progress: what is read, its bytes that are done and their number (0: not known), records.
Reading = Callable[[str, int, int, int], None]


def prepare_data(
    data: DataConfig, tokenizer: Tokenizer, reading: Reading | None = None
) -> tuple[TokenizedDataset, TokenizedDataset]:
    """The training and the held-out examples. Raises UserError for data that cannot be used."""
    recipe = recipe_of(data)
    name = data.name()
    if data.stream:
        return _streamed(data, recipe, tokenizer, reading)
    stores = [_tokenised(source, data, recipe, tokenizer, reading) for source in data.sources()]
    ends = np.cumsum([len(part) for part in stores])
    if data.replay is not None:
        stores.append(_tokenised(data.replay.source(), data, recipe, tokenizer, reading))
    store, learned = joined(stores), int(ends[-1])
    if data.eval is None and _is_one_text(store, learned):
        train_data, eval_data = _parted(store, data, name)
        if data.replay is not None:
            train_data = _with_replay(train_data, store, learned, data)
        return train_data, _limited(eval_data, data.eval_limit)
    if data.eval is not None:
        training = np.arange(learned)
        eval_store = _tokenised(_eval_source(data), data, recipe, tokenizer, reading)
        heldout: Sequence[int] = range(len(eval_store))
    else:
        eval_store = store
        heldout = _heldout(store, learned, data, name)
        training = np.setdiff1d(np.arange(learned), heldout)
        heldout = heldout[: data.eval_limit]
    train_data = dataset_of(f"{name}, training", store, training.tolist(), data.max_length)
    train_data = _mixed(train_data, data, ends)
    if data.replay is not None:
        train_data = _with_replay(train_data, store, learned, data)
    eval_name = f"{data.eval or name}, held out"
    eval_data = dataset_of(eval_name, eval_store, heldout, data.max_length)
    return train_data, _limited(eval_data, data.eval_limit)


def prepare_as_heldout(
    source: str, config: RunConfig, tokenizer: Tokenizer, limit: int | None = None
) -> TokenizedDataset:
    """The examples of `source`, read as those that the run holds out: what of them is learned, what
    becomes of long ones, the chat template's variables, and, where the run learns from answers or
    texts, their columns. UserError for data that cannot be used."""
    data = config.data
    recipe = recipe_of(data)
    if config.chosen_objective().unit != NATS_PER_TARGET:
        recipe = replace(recipe, layout=RECOGNISED)
    store = _tokenised(DataSource(path=source, limit=limit), data, recipe, tokenizer, None)
    return dataset_of(source, store, range(len(store)), data.max_length)


def prepare_prompt_data(
    data: DataConfig, tokenizer: Tokenizer
) -> tuple[PromptDataset, PromptDataset]:
    """The prompts to train on and those held out. UserError for data that cannot be used."""

    def read(source: DataSource) -> PromptDataset:
        return prepare_prompts(
            source.path,
            tokenizer,
            split=source.split,
            limit=source.limit,
            max_length=data.max_length,
            layout=source.layout() or data.layout(),
            inputs=template_inputs(data),
        )

    whole = joined_prompts([read(source) for source in data.sources()], data.name())
    if data.eval is None:
        train, heldout = split_prompts(whole, data.eval_fraction, seed=data.seed)
        if data.eval_limit is not None and len(heldout) > data.eval_limit:
            heldout = heldout.part(range(data.eval_limit), heldout.name)
        return train, heldout
    heldout = read(_eval_source(data))
    return replace(whole, name=f"{whole.name}, training"), replace(
        heldout, name=f"{data.eval}, held out"
    )


def prepare_probe(config: RunConfig, tokenizer: Tokenizer) -> TokenizedDataset | None:
    """The examples that `evaluation.probe` names; None if it names none, or where the shipped ones
    cannot be measured because the objective predicts no tokens."""
    source, data = config.evaluation.probe, config.data
    options: dict[str, Any] = {"max_length": data.max_length, "inputs": template_inputs(data)}
    if source == SHIPPED:
        predicts = config.chosen_objective().reads.predicts_tokens
        return shipped_probe(tokenizer, **options) if predicts else None
    return None if source is None else prepare(source, tokenizer, **options)


def _eval_source(data: DataConfig) -> DataSource:
    assert data.eval is not None
    return DataSource(path=data.eval, split=data.eval_split, limit=data.eval_limit)


def _streamed(
    data: DataConfig, recipe: Recipe, tokenizer: Tokenizer, reading: Reading | None
) -> tuple[TokenizedDataset, TokenizedDataset]:
    """The stream, and the held-out examples."""
    name, parts = data.name(), [_stream_part(source, recipe) for source in data.sources()]
    if parts[0].weight is None:
        parts = _merged(parts)
    if data.replay is not None:
        total = sum(part.weight or 1.0 for part in parts)
        share = (1 - data.replay.fraction) / total
        parts = [replace(part, weight=share * (part.weight or 1.0)) for part in parts]
        replayed = _stream_part(data.replay.source(), recipe)
        parts.append(replace(replayed, weight=data.replay.fraction, replayed=True))
    usable = usable_processes()
    helpers = 0 if data.processes == 1 or usable == 1 else data.processes or usable - 1
    stream = ExampleStream(
        name,
        parts,
        tokenizer,
        records=data.stream_buffer,
        seed=data.seed,
        heldout=data.eval_fraction if data.eval is None else 0.0,
        helpers=helpers,
    )
    train_data = streamed(stream)
    if data.eval is not None:
        store = _tokenised(_eval_source(data), data, recipe, tokenizer, reading)
        eval_data = dataset_of("", store, range(len(store)), data.max_length)
    else:
        eval_data = stream.heldout(data.eval_limit)
    shown = f"{name}, training (a stream, of which these are the first records)"
    return (
        replace(train_data, name=shown),
        replace(_limited(eval_data, data.eval_limit), name=f"{data.eval or name}, held out"),
    )


def _limited(dataset: TokenizedDataset, limit: int | None) -> TokenizedDataset:
    """The first examples, as a long text may have become many."""
    if limit is None or len(dataset) <= limit:
        return dataset
    examples = dataset.examples[:limit]
    return replace(dataset, examples=examples, duplicates=tuple(find_duplicates(examples)))


def _stream_part(source: DataSource, recipe: Recipe) -> StreamPart:
    files = files_to_stream(source.path, source.split)
    if files is None or source.limit is not None:
        reason = "reads files" if files is None else "takes no limit"
        raise UserError(f"{source.path}: data.stream {reason}; set data.stream: false")
    layout = source.layout()
    own = recipe if layout is None else replace(recipe, layout=layout)
    return StreamPart(tuple(files), own, source.weight)


def _merged(parts: list[StreamPart]) -> list[StreamPart]:
    """Parts of one recipe as one, whose files are read one after the other."""
    if any(part.recipe != parts[0].recipe for part in parts):
        raise UserError(
            "data.train: sources of a stream that are read each in its own way need weights"
        )
    return [StreamPart(tuple(file for part in parts for file in part.files), parts[0].recipe)]


def recipe_of(data: DataConfig) -> Recipe:
    """What decides the tokens."""
    return Recipe(
        max_length=data.max_length,
        on_too_long=data.on_too_long,
        on_undecidable=data.on_undecidable,
        loss_on=data.loss_on,
        train_on_reasoning=data.train_on_reasoning,
        train_on_tool_calls=data.train_on_tool_calls,
        inputs=template_inputs(data),
        layout=data.layout(),
    )


def _tokenised(
    source: DataSource,
    data: DataConfig,
    recipe: Recipe,
    tokenizer: Tokenizer,
    reading: Reading | None,
) -> OutcomeStore:
    """The outcomes of one source, from the cache where it is large and was read before."""
    if (layout := source.layout()) is not None:
        recipe = replace(recipe, layout=layout)
    size = source_size(source.path, source.split)
    folder = cache.default_folder()
    files = files_among(source.path, source.split)
    kept = data.cache and files and size >= PARALLEL_BYTES and source.limit is None
    key = cache.key_of(files, recipe, tokenizer) if kept and files else ""
    done = cache.load(folder, key) if key else None
    if done is None:
        done = _worked_out(source, data, recipe, tokenizer, reading, size)
        if key:
            cache.save(folder, key, done, limit=int(data.cache_gb * 10**9))
    raise_listed(source.path, done.problems, len(done.store) + len(done.problems))
    if not len(done.store):
        raise UserError(f"{source.path}: holds no records; give a source that has some")
    return done.store


def _worked_out(
    source: DataSource,
    data: DataConfig,
    recipe: Recipe,
    tokenizer: Tokenizer,
    reading: Reading | None,
    size: int,
) -> Tokenised:
    known = 0 if source.limit is not None else size  # bytes that will be read

    def tell(done: int, records: int) -> None:
        if reading is not None:
            reading(source.path, done, known, records)

    _, chunks = chunks_of(source.path, source.split)
    processes = data.processes or (usable_processes() if size >= PARALLEL_BYTES else 1)
    return tokenise(
        chunks if source.limit is None else first_rows(chunks, source.limit),
        recipe,
        tokenizer,
        processes=processes,
        progress=tell,
    )


def _is_one_text(store: OutcomeStore, learned: int) -> bool:
    """Whether what is learned is one text, which became several examples."""
    return learned == 1 and store.about(0).kind == "text" and len(store.examples_of(0)) > 1


def _parted(
    store: OutcomeStore, data: DataConfig, name: str
) -> tuple[TokenizedDataset, TokenizedDataset]:
    """The examples of a single text, and its last ones, which are held out."""
    whole = dataset_of(name, store, [0], data.max_length)
    begin = len(whole) - max(1, round(data.eval_fraction * len(whole)))

    def part(examples: Sequence[Example], what: str) -> TokenizedDataset:
        duplicates = tuple(find_duplicates(examples))
        return replace(whole, name=f"{name}, {what}", examples=examples, duplicates=duplicates)

    return part(whole.examples[: max(begin, 1)], "training"), part(
        whole.examples[max(begin, 1) :], "held out"
    )


def _heldout(store: OutcomeStore, records: int, data: DataConfig, name: str) -> list[int]:
    """Those of the first `records` that are held out."""
    contents = [store.key(i).hex() for i in range(records)]
    groups = [store.group(i) for i in range(records)]
    try:
        return choose_heldout(contents, groups, data.eval_fraction, seed=data.seed)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _mixed(dataset: TokenizedDataset, data: DataConfig, ends: np.ndarray) -> TokenizedDataset:
    """The dataset with its sources in the shares that they are given, if they are.

    ends: where the records of each source end.
    """
    sources = data.sources()
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        return dataset
    examples: Any = dataset.examples
    if not isinstance(examples, StoredExamples):
        raise UserError("data.train: judged answers cannot be mixed by weight; leave weight out")
    of_source = np.searchsorted(ends, examples.records, side="right")
    numbers = [np.flatnonzero(of_source == i) for i in range(len(sources))]
    for source, own in zip(sources, numbers, strict=True):
        if not len(own):
            raise UserError(f"{source.path}: no example is left to mix; leave the source out")
    chosen = mixed(numbers, weights, seed=data.seed)
    shares = tuple(
        (source.path, len(own), len(taken))
        for source, own, taken in zip(sources, numbers, chosen, strict=True)
    )
    return replace(dataset, examples=examples.taken(np.concatenate(chosen)), mixture=shares)


def _with_replay(
    train_data: TokenizedDataset, store: OutcomeStore, first: int, data: DataConfig
) -> TokenizedDataset:
    """The dataset with the records of `data.replay` mixed in, which stand from `first` on."""
    replay = data.replay
    assert replay is not None
    name = f"{replay.path}, replayed"
    other = dataset_of(name, store, range(first, len(store)), data.max_length)
    if any(not isinstance(side.examples, StoredExamples) for side in (train_data, other)):
        raise UserError("data.replay: judged answers cannot be mixed; leave it out")
    return with_replay(train_data, other, replay.fraction, seed=data.seed)
