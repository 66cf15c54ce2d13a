"""From a record to token ids and a mask of the tokens to learn from, with exact boundaries.

A record becomes segments of text, each supervised or not, and the segments become tokens such
that no token lies in two segments. For a chat, what is supervised of an assistant's message is what
the model has to write itself: from the end of the generation prompt up to and including what ends
the turn. A template with `{% generation %}` blocks says itself where that is (see
`generation_blocks`); in others both ends are found by rendering (see `turns`). Where neither gives
an exact place, an Undecided says so.

What a message, a prompt or a completion says is text: where it spells a control token, it is
encoded as plain text (see `control`). A `text` is the whole that the model sees, so control tokens
in it keep their meaning. A text, a completion or an assistant's message that ends in an end token
gets no second one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lora_engine.data.chat import Chat, Learning, LossOn, ended_note, spelled_note
from lora_engine.data.control import ControlTokens
from lora_engine.data.encode import Encoder
from lora_engine.data.records import Record
from lora_engine.data.segments import Segment, Text
from lora_engine.data.template import Tokenizer
from lora_engine.errors import UserError

# The columns of what multiplies the loss of each target, and that of a pair or judged answer.
WEIGHT, EXAMPLE_WEIGHT = "weight", "example_weight"
# The column of the token to learn at each target in place of the one that stands there; -1: none.
TARGET = "target"


@dataclass(frozen=True)
class Example:
    """One tokenized record.

    input_ids: token ids, length n.
    supervised: length n; True where the token is a target of the loss. The first token of an
        example has no predecessor, so it never counts.
    origin: where the record stands.
    truncated: whether tokens were cut off its end.
    adapter: name of the adapter that learns from it ("": none named).
    notes: what was done with its text that its author may not expect.
    ignored: keys of its messages, "messages.KEY", that the chat template does not read.
    role: what it is to an objective: "chosen" or "rejected" of a pair, "desirable" or
        "undesirable", "mismatched"; "" where it is learned from as it is.
    others: what has to be in the same batch: the rejected answer to a chosen one, an answer to
        another prompt for one that is judged.
    columns: numbers for the objective by name, one for the example or one for each target.
    """

    input_ids: list[int]
    supervised: list[bool]
    origin: str = ""
    truncated: bool = False
    adapter: str = ""
    notes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    role: str = ""
    others: tuple["Example", ...] = ()
    columns: Mapping[str, float | Sequence[float]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def sequences(self) -> tuple["Example", ...]:
        """The example and its `others`."""
        return (self, *self.others)

    @property
    def num_tokens(self) -> int:
        """Tokens of all its sequences."""
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def num_targets(self) -> int:
        """Number of tokens the loss is taken over."""
        return sum(self.supervised[1:])


def tokenize(
    record: Record,
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    loss_on: LossOn = "assistant",
    encoder: Encoder | None = None,
    asked: int = 0,
    train_on_reasoning: bool = True,
    train_on_tool_calls: bool = True,
) -> Example:
    """Token ids and mask of `record`, cut to its first `max_length` tokens (None: whole).

    loss_on: "assistant" learns from every assistant's message and from completions,
        "last_assistant" from the last such message, "completion" from those behind the last of a
        user, "all" from every token.
    asked: how many messages of a chat are the prompt, from which nothing is learned.
    encoder: the tokenizer's, made once for many records.
    train_on_reasoning, train_on_tool_calls: whether those parts of a message are learned.
    Raises UserError if the record cannot be rendered, or not masked exactly; an Undecided where
    that is this record's fault.
    """
    encoder = encoder or Encoder(tokenizer)
    of_chat: dict[str, list[float]] = {}
    if record.kind == "tokens":
        text, ids, supervised = Text([]), list(record.tokens), list(record.supervised)
    elif record.kind == "messages":
        learning = Learning(
            loss_on=loss_on,
            reasoning=train_on_reasoning,
            tool_calls=train_on_tool_calls,
            asked=asked,
        )
        inputs = record.given.over(encoder.inputs)
        chat = Chat(encoder=encoder, inputs=inputs, learning=learning, origin=record.origin)
        text = chat.text(record.messages, record.message_weights)
        ids, supervised, of_chat = _encode_chat(text, encoder, record.origin)
    else:
        text, ids, supervised = _encode_plain(record, encoder, loss_on)
    columns: dict[str, float | Sequence[float]] = {**of_chat}
    if record.weight != 1:
        weights = of_chat.get(WEIGHT)
        columns[WEIGHT] = [record.weight * w for w in weights] if weights else record.weight
    example = Example(
        input_ids=ids,
        supervised=supervised,
        origin=record.origin,
        truncated=False,
        adapter=record.adapter,
        notes=text.notes,
        ignored=text.ignored,
        columns=columns,
    )
    if max_length is None or len(ids) <= max_length:
        return example
    return replace(part(example, range(max_length)), truncated=True)


def part(example: Example, kept: Sequence[int]) -> Example:
    """Some tokens of an example, by their places, with the columns' numbers of its targets."""
    places = [i for i in range(1, len(example)) if example.supervised[i]]
    columns: dict[str, float | Sequence[float]] = {}
    for name, value in example.columns.items():
        if isinstance(value, Sequence):
            of_place = dict(zip(places, value, strict=True))
            value = [of_place[i] for i in kept[1:] if i in of_place]
        columns[name] = value
    return replace(
        example,
        input_ids=[example.input_ids[i] for i in kept],
        supervised=[example.supervised[i] for i in kept],
        columns=columns,
    )


def _encode_chat(
    text: Text, encoder: Encoder, origin: str
) -> tuple[list[int], list[bool], dict[str, list[float]]]:
    """Token ids, whether each is learned, and columns: weights where not all are 1, and targets
    where there are any."""
    parts = encoder.encode_parts(text.segments, origin=origin)
    ids: list[int] = []
    supervised: list[bool] = []
    for segment, own in zip(text.segments, parts, strict=True):
        ids += own
        supervised += [segment.supervised] * len(own)
    columns: dict[str, list[float]] = {}
    if any(segment.weight != 1 for segment in text.segments):
        columns[WEIGHT] = _of_targets(
            [segment.weight for segment in text.segments], parts, supervised
        )
    if any(segment.target for segment in text.segments):
        targets = [encoder.token(segment) for segment in text.segments]
        columns[TARGET] = _of_targets(targets, parts, supervised)
    return ids, supervised, columns


def _of_targets(
    values: Sequence[float], parts: Sequence[Sequence[int]], supervised: Sequence[bool]
) -> list[float]:
    """The values of segments, whose tokens are `parts`, at each of their targets."""
    of_tokens = [value for value, own in zip(values, parts, strict=True) for _ in own]
    return [v for v, learned in zip(of_tokens[1:], supervised[1:], strict=True) if learned]


def _encode_plain(
    record: Record, encoder: Encoder, loss_on: LossOn
) -> tuple[Text, list[int], list[bool]]:
    """Plain text between the tokenizer's own beginning (if it writes one) and its end token."""
    tokenizer, control = encoder.tokenizer, encoder.control
    if control.eos is None:
        raise UserError(
            f"{record.origin}: the tokenizer has no end-of-sequence token, so the model could not "
            "learn where to stop; set tokenizer.eos_token"
        )
    (eos, eos_id), (bos, first) = control.eos, control.bos
    if record.kind == "completion":
        text, ends = _completion(record, control, eos, bos, loss_on)
    else:
        text, ends = _text(record, control, eos, bos)
    ids, supervised = encoder.encode_segments(text.segments, origin=record.origin)
    if first is not None and ids[:1] != [first]:
        ids, supervised = [first, *ids], [loss_on == "all", *supervised]
    learns = any(part.supervised and part.text.strip() for part in text.segments)
    if ids[-1:] != [eos_id]:
        ids += tokenizer.convert_tokens_to_ids(ends)
        supervised += [learns] * len(ends)
    return text, ids, supervised


def _completion(
    record: Record, control: ControlTokens, eos: str, bos: str, loss_on: LossOn
) -> tuple[Text, list[str]]:
    """Prompt and completion, and the tokens that end them."""
    assert isinstance(record.prompt, str) and isinstance(record.completion, str)
    prompt = record.prompt.removeprefix(bos)
    completion, ends = control.split_end(record.completion)
    notes = [ended_note(ends)] if ends else []
    if spelled := control.found_in([prompt, completion]):
        rendered = "; a conversation rendered already belongs in 'messages' or 'text'"
        notes.append(spelled_note(spelled) + rendered)
    segments = [Segment(prompt, loss_on == "all"), Segment(completion, True)]
    marked = [replace(part, text=control.mark(part.text)) for part in segments if part.text]
    return Text(marked, tuple(notes)), list(ends or [eos])


def _text(record: Record, control: ControlTokens, eos: str, bos: str) -> tuple[Text, list[str]]:
    """A text as it stands, and the token that ends it if it does end and not say so itself."""
    body, ends = control.split_end(record.text)
    notes = [ended_note(ends)] if ends else []
    if spelled := control.found_in(body.removeprefix(bos)):
        notes.append(f"{', '.join(map(repr, spelled))} in its text kept as control tokens")
    segments = [Segment(record.text, True)] if record.text else []
    return Text(segments, tuple(notes)), [] if ends or record.goes_on else [eos]
