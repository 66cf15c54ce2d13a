"""How rows become examples: everything that decides their tokens, and the work on a chunk."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from lora_engine.data.chat import LossOn
from lora_engine.data.chunks import Chunk
from lora_engine.data.encode import Encoder
from lora_engine.data.fit import OnTooLong, Splitter, cut
from lora_engine.data.formats.columns import RECOGNISED, Layout
from lora_engine.data.inputs import NO_INPUTS, TemplateInputs
from lora_engine.data.listing import without_origin
from lora_engine.data.pairs import check_answers, example_of
from lora_engine.data.readers import RowError
from lora_engine.data.records import Record, record_of
from lora_engine.data.render import Example
from lora_engine.data.store import Outcome, OutcomeStore, store_of
from lora_engine.data.template import Tokenizer, Undecided
from lora_engine.errors import UserError

OnUndecidable = Literal["refuse", "drop"]
NO_ANSWER = "nothing to learn from: the answer is empty"
NO_ASSISTANT = "nothing to learn from: no message has the role 'assistant'"
NOT_LEARNED = "nothing to learn from: no part of an answer is to be learned"
ANSWER_CUT_OFF = "nothing to learn from: the answer lies beyond max_length"
NO_WEIGHT = "nothing to learn from: its weight is 0"
TOO_LONG = "longer than max_length"


@dataclass(frozen=True)
class Recipe:
    """What decides the tokens of a record.

    max_length: longest example in tokens; None for no limit.
    on_too_long: "split" makes several examples of a text and truncates others, "truncate" keeps the
        first max_length tokens of a text, and of others as much as leaves an answer (see `fit`),
        "drop" leaves the record out.
    on_undecidable: "refuse" counts a record as malformed that the chat template cannot write or
        whose learned tokens cannot be told from the rest, "drop" leaves it out.
    loss_on, train_on_reasoning, train_on_tool_calls: what is learned, see `render.tokenize`.
    inputs: what the chat template is given where a record brings nothing of its own.
    layout: what the records' fields are, where that is not to be recognised.
    """

    max_length: int | None = 2048
    on_too_long: OnTooLong = "split"
    on_undecidable: OnUndecidable = "refuse"
    loss_on: LossOn = "assistant"
    train_on_reasoning: bool = True
    train_on_tool_calls: bool = True
    inputs: TemplateInputs = NO_INPUTS
    layout: Layout = RECOGNISED

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"max_length must be at least 2 tokens, got {self.max_length}")


class Result(NamedTuple):
    """What became of a chunk: outcomes, and (origin, what is wrong) of malformed records."""

    store: OutcomeStore
    problems: list[tuple[str, str]]
    size: int


class Tokenising:
    """Applies a recipe with a tokenizer."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        self.recipe = recipe
        self.tokenizer = tokenizer
        self._encoder = Encoder(tokenizer, recipe.inputs)
        self._splitter = Splitter(tokenizer)

    def run(self, chunk: Chunk) -> Result:
        """What becomes of the chunk's rows."""
        outcomes: list[Outcome] = []
        problems: list[tuple[str, str]] = []
        for row in chunk.parsed():
            if isinstance(row, RowError):
                problems.append((row.origin, row.problem))
                continue
            try:
                outcomes.append(self.outcome(record_of(row, self.recipe.layout)))
            except UserError as error:
                problems.append(without_origin(error, row.origin))
        return Result(store_of(outcomes), problems, chunk.size)

    def outcome(self, record: Record) -> Outcome:
        """What becomes of a record. Raises UserError "origin: why" for one that is malformed."""
        try:
            example = self._example(record)
        except Undecided as error:
            if self.recipe.on_undecidable == "refuse":
                raise
            return _outcome(record, (), without_origin(error, record.origin)[1], ())
        reason = self._reason_to_drop(record, example)
        examples = () if reason else self._fitted(record, example)
        if not reason and not examples:
            reason = ANSWER_CUT_OFF
        return _outcome(record, examples, reason or "", example.ignored)

    def _example(self, record: Record) -> Example:
        recipe = self.recipe
        is_paired = record.kind in ("preference", "unpaired")
        keep = recipe.max_length if is_paired and recipe.on_too_long != "drop" else None
        return example_of(
            record,
            self.tokenizer,
            max_length=keep,
            loss_on=recipe.loss_on,
            encoder=self._encoder,
            train_on_reasoning=recipe.train_on_reasoning,
            train_on_tool_calls=recipe.train_on_tool_calls,
        )

    def _fitted(self, record: Record, example: Example) -> tuple[Example, ...]:
        """The example, or what is made of one that is too long: none where no answer is left."""
        limit = self.recipe.max_length
        if limit is None or len(example) <= limit:
            return (example,)
        if record.kind == "text" and self.recipe.on_too_long == "split":
            return tuple(self._splitter.split(example, limit))
        shorter = cut(example, limit, self.tokenizer.bos_token_id)
        return (shorter,) if shorter.num_targets else ()

    def _reason_to_drop(self, record: Record, example: Example) -> str | None:
        if record.drop:
            return record.drop
        if not record.has_answer():
            roles = {message["role"] for message in record.messages}
            return NO_ASSISTANT if roles and "assistant" not in roles else NO_ANSWER
        if record.weight == 0:
            return NO_WEIGHT
        limit = self.recipe.max_length
        is_too_long = limit is not None and max(map(len, example.sequences)) > limit
        if is_too_long and self.recipe.on_too_long == "drop":
            return TOO_LONG
        if example.role:
            return check_answers(example)
        if example.num_targets == 0:
            return NOT_LEARNED if record.kind == "messages" else NO_ANSWER
        return None


def _outcome(
    record: Record, examples: tuple[Example, ...], dropped: str, ignored: tuple[str, ...]
) -> Outcome:
    return Outcome(
        origin=record.origin,
        kind=record.kind,
        format=record.format,
        key=bytes.fromhex(record.content_key()),
        group=record.group,
        examples=examples,
        dropped=dropped,
        ignored=(*record.ignored, *ignored),
    )
